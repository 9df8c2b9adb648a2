"""Checks of lesson 2."""

import warnings

import torch
from torch import nn

from lessons.checking import Wrong, expect, expect_number, expect_numbers

E4M3 = torch.float8_e4m3fn


def mixed_precision_gigabytes(theirs):
    for n in (7_500_000_000, 124_000_000):
        expect_number(
            theirs(n),
            16 * n / 1e9,
            f"{n:,} parameters, in GB",
            {
                "That is 12 bytes per parameter. The float32 master weights (4 bytes) are forgotten, or one of AdamW's "
                "moments.": 12 * n / 1e9,
                "That is 4 bytes per parameter: weights and gradients without the optimizer.": 4 * n / 1e9,
                "That is 18 bytes per parameter: float32 gradients, as some frameworks keep them. The paper counts "
                "2.": 18 * n / 1e9,
                "That is 14 bytes per parameter: two bytes are forgotten, the gradients or the weights.": 14 * n / 1e9,
                "That is 20 bytes per parameter: everything in float32, and a master copy on top.": 20 * n / 1e9,
            },
        )


def autocast_bytes(theirs):
    n, linear = 1_000_000, 700_000
    right = {"parameters": 4 * n, "gradients": 4 * n, "optimizer states": 8 * n, "weight casts": 2 * linear}
    mistakes = {
        "parameters": {
            "Autocast does not change the parameters: they were made in float32 and stay so. It casts copies.": 2 * n,
            "The copies have an entry of their own, weight casts.": 4 * n + 2 * linear,
        },
        "gradients": {
            "A gradient has its parameter's dtype, and autocast leaves that at float32.": 2 * n,
        },
        "optimizer states": {
            "That includes a master copy. The parameters are float32 already: they are the master.": 12 * n,
            "AdamW keeps two moments for every parameter, in float32.": 4 * n,
        },
        "weight casts": {
            "Only weights of linear layers are cast; an embedding is looked up, not multiplied.": 2 * n,
            "The copies are bfloat16, 2 bytes each.": 4 * linear,
            "Autocast does keep copies: every linear layer multiplies with a bfloat16 copy of its weight.": 0,
        },
    }
    what = f"{n:,} parameters, {linear:,} of them linear weights, in bytes"
    expect_numbers(theirs(n, linear), right, what, mistakes)


def linear_dtypes(theirs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Sequential(nn.Linear(5, 4)))
    x = torch.randn(3, 6)
    contexts = {
        "without autocast": (torch.autocast("cpu", enabled=False), torch.float32),
        "under torch.autocast('cpu', torch.bfloat16)": (torch.autocast("cpu", torch.bfloat16), torch.bfloat16),
        "under autocast for another device than the tensors': a no-op": (_elsewhere(), torch.float32),
    }
    for words, (context, dtype) in contexts.items():
        with context:
            found = theirs(model, x)
        right = {"0": dtype, "2.0": dtype}
        expect(isinstance(found, dict), f"Your function returned {found!r}; a dictionary from name to dtype is asked.")
        if missing := right.keys() - found.keys():
            raise Wrong(
                f"The model has linear layers named '0' and '2.0'; your answer lacks {', '.join(sorted(missing))}. "
                "named_modules() also goes into modules of modules."
            )
        if extra := found.keys() - right.keys():
            raise Wrong(f"{', '.join(map(repr, sorted(extra)))} is no nn.Linear.")
        if dtype == torch.bfloat16 and set(found.values()) == {torch.float32}:
            raise Wrong(
                f"Here autocast is on, and you say float32. Did you look at the weights or the inputs? Autocast leaves "
                f"them alone; the layers' outputs tell ({words})."
            )
        if dtype == torch.float32 and set(found.values()) == {torch.bfloat16}:
            raise Wrong(f"You say bfloat16 where nothing is computed in it ({words}). Look at the layers' outputs.")
        expect(found == right, f"You say {found}, but the outputs are {dtype} ({words}).")
    left = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    expect(not left, f"{left} hooks are still on the model: remove them when you are done.")


def _elsewhere():
    """Autocast for CUDA around tensors on the CPU: it is accepted, warns at most, and does nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.autocast("cuda", torch.bfloat16)


@torch.no_grad()
def master_step(theirs):
    steps, lr = 200, 1e-4
    weight, master = torch.ones(4, dtype=torch.bfloat16), torch.ones(4)
    gradient = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.bfloat16)
    for _ in range(steps):
        theirs(weight, master, gradient, lr)
    expect(
        weight.dtype == torch.bfloat16 and master.dtype == torch.float32,
        "weight must stay bfloat16 and master float32: update in place (sub_, copy_).",
    )
    right = 1 - steps * lr * gradient.float()
    moved = not torch.equal(master, torch.ones(4))
    if not moved and torch.equal(weight, torch.ones(4, dtype=torch.bfloat16)):
        raise Wrong(
            f"After {steps} steps of about {lr} nothing has moved: every single update was rounded away in bfloat16. "
            "Update the float32 master, and in place: `master = …` makes another tensor and leaves this one as it was."
        )
    if not moved:
        raise Wrong("The master has not moved; it is what has to be updated.")
    if torch.allclose(master, 2 - right, atol=1e-4):
        raise Wrong("The weights go up where they should go down: w − lr · gradient.")
    expect(
        torch.allclose(master, right, atol=1e-5),
        f"After {steps} steps the master is {master.tolist()}, and should be {right.tolist()}. Does something round it "
        "to bfloat16 on the way?",
    )
    expect(
        torch.equal(weight, master.bfloat16()),
        "The master is right, but the weight is not its bfloat16 copy: the model would go on computing with old "
        "weights.",
    )


@torch.no_grad()
def take_masters(theirs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32, bias=False), nn.Tanh(), nn.Linear(32, 8))
    initial = {name: p.clone() for name, p in model.named_parameters()}
    masters = theirs(model)
    expect(isinstance(masters, dict), f"Your function returned {type(masters).__name__}; a dictionary is asked for.")
    if missing := [name for name in initial if name not in masters]:
        raise Wrong(f"Your dictionary lacks {missing[0]}: every parameter has a master, a bias too.")
    for name, p in model.named_parameters():
        expect(
            p.dtype == torch.bfloat16,
            f"{name} of the model is still {str(p.dtype).removeprefix('torch.')}: nothing was rounded but a copy of it "
            "that nobody keeps. model.bfloat16() does it in place.",
        )
        master, value = masters[name], initial[name]
        expect(
            master.dtype == torch.float32 and master.shape == value.shape,
            f"The master of {name} is {master.dtype} {list(master.shape)}; float32 {list(value.shape)} is asked for.",
        )
        if not torch.equal(master, value) and torch.equal(master, value.bfloat16().float()):
            raise Wrong(
                f"The master of {name} lies on bfloat16's grid: it was taken after the model had been rounded. float32 "
                "has room for the digits, but they are gone, and the first small updates find every weight in the "
                "middle between two roundings. Take the masters first."
            )
        expect(torch.equal(master, value), f"The master of {name} is not what the parameter was before.")
        expect(torch.equal(p, value.bfloat16()), f"{name} of the model is not its old value, rounded to bfloat16.")


def quantize_e4m3(theirs):
    generator = torch.Generator().manual_seed(0)
    for size in (1e4, 1e-4, 1.0):
        x = size * torch.randn(8, 16, generator=generator)
        q, scale = _quantized(theirs, x)
        back = q.float() * scale
        rounding = x.abs() * 2**-4 + x.abs().max() * 2**-17  # half a step of three bits; the smallest numbers
        if bool(((back - x).abs() <= rounding).all()):
            largest = q.float().abs().max().item()
            expect(largest > 440, f"The largest |q| is {largest:g}: scale so that it is 448, or precision is wasted.")
            continue
        inverse = torch.allclose(q.float() / scale, x, rtol=0.07, atol=1e-3 * size)
        if inverse and not torch.allclose(back, x, rtol=0.07, atol=1e-3 * size):
            raise Wrong("q / scale is x, but q · scale is asked for: your scale is the wrong way round.")
        if not back.isfinite().all() or back.abs().max() < 0.9 * x.abs().max():
            raise Wrong(
                f"The largest magnitude in x is {x.abs().max().item():.3g}, and e4m3 ends at 448: larger numbers are "
                "cut off there, or become NaN. Divide by the scale before you cast."
            )
        ends = int((q.float().abs() >= 448).sum())
        if ends > x.numel() // 4:
            raise Wrong(f"{ends} of {x.numel()} numbers are cut off at 448, e4m3's largest. Divide by the scale first.")
        lost = int(((back == 0) & (x != 0)).sum())
        if lost > x.numel() // 4:
            raise Wrong(f"{lost} of {x.numel()} numbers became zero: they are too small for e4m3 without a scale.")
        raise Wrong(f"q · scale is up to {((back - x).abs() / x.abs()).max().item():.0%} away from x; 6 % is rounding.")
    q, scale = _quantized(theirs, torch.zeros(3))
    expect(
        bool((q.float() * scale).eq(0).all()) and bool(scale.isfinite().all()),
        "A tensor of zeros becomes NaN: its largest magnitude is 0, and so is the scale that you divide by.",
    )


def _quantized(theirs, x):
    result = theirs(x.clone())
    expect(isinstance(result, tuple) and len(result) == 2, "Two things are asked for: (q, scale).")
    q, scale = result
    expect(q.dtype == E4M3, f"q is {q.dtype}; torch.float8_e4m3fn is asked for.")
    expect(q.shape == x.shape, f"q has shape {tuple(q.shape)}, x {tuple(x.shape)}.")
    expect(isinstance(scale, torch.Tensor) and scale.numel() == 1, "scale must be a tensor with one element.")
    return q, scale
