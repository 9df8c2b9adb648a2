"""Checks of lesson 2."""

import warnings

import torch
from torch import nn

from lessons.cases import formula, generated, st
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
                "That is 8 bytes per parameter: the moments alone, or 16 bits for everything in the optimizer "
                "as well.": 8 * n / 1e9,
                "That is 10 bytes per parameter: the optimizer keeps its three numbers in float32, 4 bytes each.": 10
                * n
                / 1e9,
            },
        )
    formula(theirs, lambda n: n * (16 + 16 + 32 + 32 + 32) / 8 / 1e9, "in GB", parameters=st.integers(0, 10**12))


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
            "AdamW keeps its two moments in float32, 4 bytes each.": 4.0 * n,
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
    formula(
        theirs,
        lambda others, linear: {
            "parameters": others * 4, "gradients": others * 4, "optimizer states": others * (4 + 4),
            "weight casts": linear * 16 // 8,
        },
        "in bytes", parameters=st.integers(10**6, 10**12), linear_weights=st.integers(0, 10**6),
    )  # fmt: skip


class _Island(nn.Module):
    """A layer that switches autocast off for itself, as a loss or a norm does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.layer(x.float())


class _Watched(nn.Sequential):
    """Counts how often it is called."""

    calls, gave = 0, None

    def forward(self, x):
        self.calls += 1
        self.gave = super().forward(x)
        return self.gave


class _Own(nn.Linear):
    """A linear layer of a class of its own."""


def linear_dtypes(theirs):
    torch.manual_seed(0)
    model = _Watched(nn.Linear(6, 5), nn.LayerNorm(5), nn.Sequential(nn.Linear(5, 4)))
    x = torch.randn(3, 6)
    contexts = {
        "without autocast": (torch.autocast("cpu", enabled=False), torch.float32),
        "under torch.autocast('cpu', torch.bfloat16)": (torch.autocast("cpu", torch.bfloat16), torch.bfloat16),
        "under autocast for another device than the tensors': a no-op": (_elsewhere(), torch.float32),
    }
    for words, (context, dtype) in contexts.items():
        model.gave = None
        with context:
            found = theirs(model, x)
            _left_as_it_was(model, x, words)
        right = {"0": dtype, "2.0": dtype}
        _named(found, model, right, words)
        if dtype == torch.bfloat16 and set(found.values()) == {torch.float32}:
            raise Wrong(
                f"Here autocast is on, and you say float32. Did you look at the weights or the inputs? Autocast leaves "
                f"them alone; the layers' outputs tell ({words})."
            )
        if dtype == torch.float32 and set(found.values()) == {torch.bfloat16}:
            raise Wrong(f"You say bfloat16 where nothing is computed in it ({words}). Look at the layers' outputs.")
        expect(found == right, f"You say {found}, but the outputs are {dtype} ({words}).")
    expect(
        model.calls == len(contexts),
        f"Right, but in {len(contexts)} calls of your function the model is called {model.calls} times: once each is "
        "asked for. Hooks on all layers see one pass.",
    )
    _layers(theirs, ["one with autocast off", "a block", "a norm"], True)
    _layers(theirs, ["a subclass of Linear"], False)
    generated(
        lambda layers, autocast: _layers(theirs, layers, autocast), most=30,
        layers=st.lists(st.sampled_from(list(LAYERS)), max_size=4), autocast=st.booleans(),
    )  # fmt: skip


LAYERS = {
    "a linear layer": (lambda: nn.Linear(4, 4), "", True),
    "a norm": (lambda: nn.LayerNorm(4), None, True),
    "a block": (lambda: nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(4, 4, bias=False))), ".1.0", True),
    "one with autocast off": (lambda: _Island(nn.Linear(4, 4)), ".layer", False),
    "a subclass of Linear": (lambda: _Own(4, 4), "", True),
    "a ReLU": (lambda: nn.ReLU(), None, True),
}
"""What → (a module, the name of the linear layer in it, whether autocast reaches that)."""


def _layers(theirs, layers, autocast):
    """Linear layers here and there, some of them where autocast is off."""
    model, right = _Watched(), {}
    for i, what in enumerate(layers):
        make, name, reached = LAYERS[what]
        model.append(make())
        if name is not None:
            right[f"{i}{name}"] = torch.bfloat16 if autocast and reached else torch.float32
    model.register_forward_hook(lambda module, inputs, output: None)  # somebody else's
    words = f"[{', '.join(layers)}] {'under autocast' if autocast else 'without autocast'}"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = theirs(model, torch.ones(2, 4))
        _left_as_it_was(model, torch.ones(2, 4), words)
    _named(found, model, right, words)
    expect(found == right, f"{words}: you say {found}; the outputs are {right}. Look at each layer's own output.")
    expect(model.calls == 1, f"{words}: the model is called {model.calls} times; once is asked for.")


def _left_as_it_was(model, x, words):
    """Nothing stands in the place of a layer's forward, and nothing stood in that of its output."""
    for name, module in model.named_modules():
        if "forward" in vars(module):
            raise Wrong(f"{name!r} still has the forward that you gave it ({words}). Use a hook, and remove it.")
    seen, calls = model.gave, model.calls
    right = model(x)
    model.calls = calls
    expect(
        seen is None or torch.equal(seen, right) and seen.dtype == right.dtype,
        f"While you look, the model computes something else than before ({words}). What a forward hook returns takes "
        "the output's place: let it return nothing.",
    )


def _named(found, model, right, words):
    """Whether the names are those of the linear layers."""
    expect(isinstance(found, dict), f"Your function returned {found!r}; a dictionary from name to dtype is asked.")
    last = [name for name, _ in model.named_modules()][-1]
    if len(found) == 1 and len(right) > 1 and set(found) <= {last, list(right)[-1]}:
        raise Wrong(
            f"Your answer has one name, {next(iter(found))!r}, where there are {len(right)} linear layers: all hooks "
            "wrote under the last name. A function sees what `name` is when it runs, after the loop. Bind it, by "
            "`def note(module, inputs, output, name=name)`."
        )
    if missing := right.keys() - found.keys():
        there = ", ".join(map(repr, right))
        nested = any("." in name for name in missing)
        raise Wrong(
            f"The model has linear layers named {there}; your answer lacks {', '.join(sorted(missing))} ({words})."
            + " named_modules() also goes into modules of modules." * nested
        )
    if extra := found.keys() - right.keys():
        raise Wrong(f"{', '.join(map(repr, sorted(extra)))} is no nn.Linear ({words}).")


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
    gradient.zero_()
    before = master.copy_(torch.tensor([1.1, -0.3, 7.0, 1e-3])).clone()
    theirs(weight, master, gradient, 1.0)
    expect(
        torch.equal(master, before),
        "With a gradient of zero the master moves: there is more in it than w − lr · gradient.",
    )
    generated(
        lambda rows, columns, lr, steps: _descended(theirs, rows, columns, lr, steps), most=30,
        rows=st.integers(0, 4), columns=st.integers(1, 5), lr=st.sampled_from([1.0, 0.1, 1e-3, 1e-5]),
        steps=st.integers(1, 4),
    )  # fmt: skip


def _descended(theirs, rows, columns, lr, steps):
    """Weight and master are views of flat buffers; the reference is in float64."""
    generator = torch.Generator().manual_seed(rows + columns)
    flat = torch.randn(rows * columns + 3, generator=generator)
    master = flat[3:].view(rows, columns)
    weight = torch.zeros(rows * columns + 2).bfloat16()[:-2].view(rows, columns).copy_(master)
    right, moved = master.double(), 0.0
    for _ in range(steps):
        gradient = torch.randn(rows, columns, generator=generator).bfloat16()
        right = right - lr * gradient.double()
        moved = moved + lr * gradient.double().abs()
        result = theirs(weight, master, gradient, lr)
        expect(result is None, "master_step works in place and returns nothing.")
    where = f"{rows} × {columns}, {steps} steps, lr {lr:g}: "
    off = (master - right).abs()
    expect(
        bool((off <= 1e-5 * moved + 1e-6 * right.abs()).all()),
        f"{where}the master is up to {off.max().item() if rows else 0:.2g} away from w − lr · gradient. Is something "
        "rounded to bfloat16 on the way? Cast the gradient to float32 first.",
    )
    expect(torch.equal(weight, master.bfloat16()), f"{where}the weight is not the master's bfloat16 copy of now.")


class _Tied(nn.Module):
    """An embedding that is the head as well."""

    def __init__(self, rows, width):
        super().__init__()
        self.embed = nn.Embedding(rows, width)
        self.scale = nn.Parameter(torch.rand(()))
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.embed.weight


@torch.no_grad()
def take_masters(theirs):
    torch.manual_seed(0)
    _masters(theirs, nn.Sequential(nn.Linear(24, 32, bias=False), nn.Tanh(), nn.Linear(32, 8)), "")
    _masters(theirs, _Tied(9, 5), "With a tied head: ")
    generated(
        lambda rows, columns, frozen, tied: _masters(
            theirs, _model(rows, columns, frozen, tied), f"{'Tied, ' * tied}{rows} × {columns}: ",
        ), most=20,
        rows=st.integers(1, 9), columns=st.integers(1, 9), frozen=st.booleans(), tied=st.booleans(),
    )  # fmt: skip


def _model(rows, columns, frozen, tied):
    torch.manual_seed(rows)
    model = _Tied(rows, columns) if tied else nn.Sequential(nn.Linear(columns, rows))
    next(model.parameters()).requires_grad_(not frozen)
    return model


def _masters(theirs, model, where):
    initial = {name: p.clone() for name, p in model.named_parameters()}
    with torch.enable_grad():
        masters = theirs(model)
    expect(isinstance(masters, dict), f"Your function returned {type(masters).__name__}; a dictionary is asked for.")
    if missing := [name for name in initial if name not in masters]:
        raise Wrong(f"{where}Your dictionary lacks {missing[0]}: every parameter has a master, a bias too.")
    if extra := [name for name in masters if name not in initial]:
        raise Wrong(
            f"{where}Your dictionary has a master for {extra[0]}, which named_parameters() does not name: a tied "
            "weight has one master, or it is updated twice."
        )
    for name, p in model.named_parameters():
        expect(
            p.dtype == torch.bfloat16,
            f"{where}{name} of the model is still {str(p.dtype).removeprefix('torch.')}: nothing was rounded but a "
            "copy of it that nobody keeps. model.bfloat16() does it in place.",
        )
        master, value = masters[name], initial[name]
        expect(isinstance(master, torch.Tensor), f"{where}The master of {name} is {master!r}; a tensor is asked for.")
        expect(
            master.dtype == torch.float32 and master.shape == value.shape,
            f"{where}The master of {name} is {master.dtype} {list(master.shape)}; float32 {list(value.shape)} is asked "
            "for. (A parameter itself is rounded with its model: take a copy.)",
        )
        if not torch.equal(master, value) and torch.equal(master, value.bfloat16().float()):
            raise Wrong(
                f"{where}The master of {name} lies on bfloat16's grid: it was taken after the model had been rounded. "
                "float32 has room for the digits, but they are gone, and the first small updates find every weight in "
                "the middle between two roundings. Take the masters first."
            )
        expect(
            master.grad_fn is None,
            f"{where}The master of {name} hangs on the parameter in autograd's graph: no optimizer takes it. Use "
            "p.detach().clone().",
        )
        expect(torch.equal(master, value), f"{where}The master of {name} is not what the parameter was before.")
        expect(
            torch.equal(p, value.bfloat16()), f"{where}{name} of the model is not its old value, rounded to bfloat16."
        )


def quantize_e4m3(theirs):
    generator = torch.Generator().manual_seed(0)
    for size in (1e4, 1e-4, 1.0, 1e-7):
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
    q, scale = _quantized(theirs, torch.tensor([-3.0, 1.0, 0.5]))
    expect(
        abs(scale.item() * 448 - 1.0) > 0.01,
        "For [-3, 1, 0.5] your scale is that of the largest number, 1. −3 is larger in magnitude: take abs() first.",
    )
    q, scale = _quantized(theirs, torch.zeros(3))
    expect(
        bool((q.float() * scale).eq(0).all()) and bool(scale.isfinite().all()),
        "A tensor of zeros becomes NaN: its largest magnitude is 0, and so is the scale that you divide by.",
    )
    generated(
        lambda shape, size, sign, seed: _rounded(theirs, shape, size, sign, seed), most=40,
        shape=st.lists(st.integers(1, 4), max_size=3), size=st.sampled_from([1.0, 448.0, 1e-7, 1e7]),
        sign=st.sampled_from([None, 1, -1]), seed=st.integers(0, 99),
    )  # fmt: skip


def _rounded(theirs, shape, size, sign, seed):
    """Against e4m3's own grid, by its definition: three bits of fraction, exponents from −6, steps of 2⁻⁹ below."""
    x = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = x if sign is None else sign * x.abs()
    x = x.permute(tuple(reversed(range(x.ndim))))  # in memory the other way round
    signs = "of either sign" if sign is None else "above zero" if sign > 0 else "below zero"
    where = f"For numbers of about {size:g}, {signs}, of shape {list(x.shape)}: "
    q, scale = _quantized(theirs, x, where)
    expect(bool(q.float().isfinite().all()), f"{where}q has nan in it.")
    largest = q.float().abs().max().item()
    expect(
        largest == 448,
        f"{where}the largest |q| is {largest:g}; it should be 448.",
    )
    exact = x.double() * 448 / x.double().abs().max()
    step = 2.0 ** (exact.abs().clamp(min=2.0**-6).log2().floor() - 3)
    off = (q.double() - exact).abs()
    expect(
        bool((off <= 0.5001 * step).all()),
        f"{where}a number that is {exact.flatten()[(off / step).argmax()].item():.4g} after scaling becomes "
        f"{q.double().flatten()[(off / step).argmax()].item():.4g}; that is not the nearest in e4m3.",
    )
    back = (q.float() * scale.reshape(())).abs().max().item()
    expect(abs(back / x.abs().max().item() - 1) < 1e-3, f"{where}q · scale has its largest at {back:g}.")


def _quantized(theirs, x, where=""):
    result = theirs(x)
    expect(isinstance(result, tuple) and len(result) == 2, f"{where}Two things are asked for: (q, scale).")
    q, scale = result
    kind = q.dtype if isinstance(q, torch.Tensor) else type(q).__name__
    expect(kind == E4M3, f"{where}q is {kind}; torch.float8_e4m3fn is asked for.")
    expect(q.shape == x.shape, f"{where}q has shape {tuple(q.shape)}, x {tuple(x.shape)}.")
    one = isinstance(scale, torch.Tensor) and scale.numel() == 1
    expect(one, f"{where}scale must be a tensor with one element, one for the whole of x.")
    expect(scale.dtype == torch.float32, f"{where}scale is {scale.dtype}; float32 is asked for.")
    return q, scale
