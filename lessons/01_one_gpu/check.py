"""Checks of lesson 1."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lessons.cases import formula, generated, st
from lessons.checking import GIB, Wrong, expect, expect_number, expect_numbers, is_number


def training_bytes(theirs):
    for n in (1000, 32 * 10**9):
        right = {"parameters": 4 * n, "gradients": 4 * n, "optimizer states": 8 * n}
        mistakes = {
            "parameters": {
                "That is 2 bytes per parameter, a bfloat16; here everything is float32.": 2 * n,
                "That is 8 bytes per parameter, a float64; here everything is float32.": 8 * n,
                "That includes the gradients, which have an entry of their own.": 8.0 * n,
                "That is everything together; gradients and optimizer states have entries of their own.": 16 * n,
            },
            "gradients": {
                "Gradients are there too: one for every parameter, of the same dtype.": 0,
                "That is 2 bytes per gradient, a bfloat16; here everything is float32.": 2 * n,
                "That is parameters and gradients together; the parameters have an entry of their own.": 8 * n,
            },
            "optimizer states": {
                "That is one moment. AdamW keeps two: of the gradient, and of its square.": 4 * n,
                "That is a float32 master copy of the weights beside the two moments; the weights are float32 already "
                "and need none.": 12 * n,
                "That is two moments of 2 bytes, in bfloat16. AdamW keeps both in float32.": 4.0 * n,
                "AdamW does keep something: two moments for every parameter.": 0,
                "That is everything together; parameters and gradients have entries of their own.": 16 * n,
            },
        }
        expect_numbers(theirs(n), right, f"{n:,} parameters, in bytes", mistakes)
    formula(
        theirs, lambda n: {"parameters": n * 32 // 8, "gradients": n * 32 // 8, "optimizer states": n * 64 // 8},
        "in bytes", parameters=st.integers(0, 10**12),
    )  # fmt: skip


def gigabytes_32b(theirs):
    expect_number(
        theirs(),
        512.0,
        "a 32B model, in GB",
        {
            "That is the parameters alone; gradients and AdamW's states are there too.": 128.0,
            "That is parameters and gradients; AdamW's states are forgotten.": 256.0,
            "That is AdamW's states alone; parameters and gradients are there too.": 256,
            "That is 12 bytes per parameter, with one of AdamW's moments; it keeps two.": 384.0,
            "That is 12 bytes per parameter, without the gradients; there is one for each, of 4 bytes.": 384,
            "That is 8 bytes per number, a float64; everything is float32.": 1024.0,
            "That has a float32 master copy of the weights, which are float32 already: 20 bytes, not 16.": 640.0,
            "That is GiB (2³⁰ bytes) where GB (10⁹ bytes) are asked for.": 512e9 / GIB,
            "That is bytes; GB are asked for.": 512e9,
        },
    )


def logits_bytes(theirs):
    for rows, length, vocabulary in ((4, 1024, 50304), (3, 7, 11)):
        n = rows * length * vocabulary
        mistakes = {
            "That is the logits alone; their gradient is as large, and both are there at once.": 4 * n,
            "That is two bytes per number; the loss is computed in float32.": 2 * 2 * n,
            "That is one number for every token; there is one for every token and every word of the vocabulary.": (
                2 * 4 * rows * length
            ),
            "That leaves out the rows of the batch.": 2 * 4 * length * vocabulary,
            "That leaves out the length of the rows.": 2 * 4 * rows * vocabulary,
            "That is a third tensor beside the logits and their gradient; two are asked for.": 3 * 4 * n,
            "That is the number of logits; a float32 has 4 bytes, and their gradient is there too.": n,
        }
        expect_number(
            theirs(rows, length, vocabulary),
            2 * 4 * n,
            f"{rows} rows of {length:,} tokens and a vocabulary of {vocabulary:,}, in bytes",
            mistakes,
        )
    formula(
        theirs, lambda rows, length, vocabulary: (4 + 4) * vocabulary * length * rows, "in bytes",
        rows=st.integers(0, 64), length=st.integers(1, 4096), vocabulary=st.integers(1, 100_000),
    )  # fmt: skip


def held_bytes(theirs):
    weight = torch.zeros(10, 6)
    half = torch.zeros(10, dtype=torch.bfloat16)
    expect_number(
        theirs([weight, half]),
        240 + 20,
        "a float32 tensor of 60 elements and a bfloat16 tensor of 10, in bytes",
        {
            "That takes 4 bytes for every element; a bfloat16 has 2. Ask the tensor.": 280,
            "That counts elements.": 70,
        },
    )
    head = weight.view(10, 6)  # a tied head: another tensor, the same memory
    expect_number(
        theirs([weight, head]),
        240,
        "an embedding and the head that is tied to it, in bytes",
        {"That counts the tied weight twice. Two tensors with one storage are the same memory.": 480},
    )
    expect_number(
        theirs([weight[2:4]]),
        240,
        "a view of two of an embedding's ten rows, in bytes",
        {"That is the view's own elements; but it keeps the whole storage alive.": 48},
    )
    expect_number(
        theirs([weight, weight[2:]]),
        240,
        "an embedding and a view of its rows from the third on, in bytes",
        {
            "That counts one storage twice. A view that begins further on has another data_ptr() of its own; "
            "its untyped_storage() has the same.": 480,
            "That counts the view beside the storage that it is a part of. Its own data_ptr() is another one; that "
            "of its untyped_storage() is the same.": 240 + 192,
        },
    )
    expect_number(theirs([]), 0, "no tensors at all, in bytes")
    generated(
        lambda rows, listed: _held(theirs, rows, listed),
        rows=st.integers(1, 4),
        listed=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(list(PARTS))), min_size=1, max_size=5),
    )


PARTS = {
    "the whole": lambda t: t,
    "the rows from the second on": lambda t: t[1:],
    "no row": lambda t: t[:0],
    "the transposed": lambda t: t.T,
    "the detached": lambda t: t.detach(),
    "the bytes": lambda t: t.view(torch.uint8),
    "the first row, expanded": lambda t: t[:1].expand(7, t.shape[1]),
    "a parameter of": lambda t: nn.Parameter(t, requires_grad=False),
}


def _held(theirs, rows, listed):
    """Three storages, and parts of them in a list."""
    storages = (torch.zeros(rows, 3), torch.zeros(5, 4, dtype=torch.bfloat16), torch.zeros(rows, 3))
    names = (f"A (float32 [{rows}, 3])", "B (bfloat16 [5, 4])", f"C (float32 [{rows}, 3])")
    right = sum((12 * rows, 40, 12 * rows)[number] for number in {number for number, _ in listed})
    what = ", ".join(f"{part} of {names[number]}".replace("of of", "of") for number, part in listed)
    found = theirs([PARTS[part](storages[number]) for number, part in listed])
    if is_number(found) and found != right:
        how = "more than once" if found > right else "not at all, or in part"
        raise Wrong(f"You say {found} bytes for [{what}]: a storage is counted {how}.")
    expect_number(found, right, f"[{what}], in bytes")


class _Model(nn.Module):
    """An embedding and a head; counts its forward passes."""

    def __init__(self, vocabulary=11):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary))
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return self.layers(inputs)


def _tokens(rows, length, vocabulary, generator):
    return (torch.randint(vocabulary, (rows, length), generator=generator) for _ in range(2))


ADAMW = partial(torch.optim.AdamW, lr=0.05)


def _train(step, sizes=(2, 5, 11), large=1.0, optimizer=ADAMW):
    """Three steps with `step`, gradients of an earlier one there; returns losses, weights and the optimizer.

    sizes: rows, length, vocabulary; large: what the first weights are multiplied by.
    """
    model = _Model(sizes[-1])
    with torch.no_grad():
        for p in model.parameters():
            p *= large
    optimizer = optimizer(model.parameters())
    generator = torch.Generator().manual_seed(1)
    losses = []
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    for _ in range(3):
        losses.append(step(model, optimizer, *_tokens(*sizes, generator)))
    return losses, [p.detach().clone() for p in model.parameters()], optimizer, model.calls


def _variant(clear="before", update=True, scale=1, most=None):
    """A step that may be wrong on purpose; clear: before, after or never; most: the norm that gradients are cut to."""

    def step(model, optimizer, inputs, targets):
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        if clear == "before":
            optimizer.zero_grad()
        (scale * loss).backward()
        if most:
            nn.utils.clip_grad_norm_(model.parameters(), most)
        if update:
            optimizer.step()
        if clear == "after":
            optimizer.zero_grad()
        return loss.item()

    return step


def training_step(theirs):
    try:
        losses, weights, optimizer, calls = _train(theirs)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise Wrong(
            "The optimizer updates before the backward pass: it has changed weights that backward() still needs. "
            "First backward(), then step()."
        ) from error
    for loss in losses:
        expect(loss is not None, "Your function returns nothing; the loss is asked for.")
        expect(
            isinstance(loss, float),
            f"Your function returns a {type(loss).__name__}; a Python number is asked for (loss.item()). A tensor "
            "would keep the graph of its step alive, and all activations with it.",
        )

    def same(step):
        return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights, _train(step)[1], strict=True))

    if not same(_variant()):
        mistakes = {
            "The gradients of the step before are still there: backward() adds to them. Clear them first, with "
            "optimizer.zero_grad().": _variant(clear="never"),
            "Your step clears the gradients at its end alone. Those that were there before the first step are in its "
            "update: clear them before backward().": _variant(clear="after"),
            "The weights do not change. Is optimizer.step() there, after backward() and before the gradients are "
            "cleared?": _variant(update=False),
            "Your gradients are those of the sum over all 10 tokens; the mean is asked for.": _variant(scale=10),
            "Your gradients are twice too large: does backward() run twice?": _variant(scale=2),
            "You clip the gradients; the four lines are all that is asked for.": _variant(most=1.0),
        }
        for message, step in mistakes.items():
            expect(not same(step), message)
        expect(
            bool(optimizer.state),
            "The weights change, but the optimizer that you were given has made no step. Do not make one of your own.",
        )
        raise Wrong("After three steps the weights are not what they should be.")
    expect(
        calls == 3,
        f"The weights are right, but three steps make {calls} forward passes. One a step is due: the loss to return is "
        "the one that backward() began at.",
    )
    right = _train(_variant())[0]
    if all(abs(a - 10 * b) < 1e-3 for a, b in zip(losses, right, strict=True)):
        raise Wrong("Your loss is the sum over all 10 tokens; the mean is asked for.")
    close = all(abs(a - b) < 1e-5 for a, b in zip(losses, right, strict=True))
    expect(close, f"The weights are right, but the losses you return are {losses}, not the mean cross-entropy.")
    _nothing_else(theirs)
    for sizes in ((1, 3, 7), (3, 1, 2)):
        _as_one_step_does(theirs, f"With {sizes[0]} rows of {sizes[1]} tokens and {sizes[2]} words: ", sizes=sizes)
    steep = partial(torch.optim.SGD, lr=1e-3)  # AdamW divides by the gradient's size
    _as_one_step_does(theirs, "With weights so large that gradients are: ", large=30.0, optimizer=steep)


def _nothing_else(theirs):
    """At a rate of zero nothing moves, not by a millionth either."""
    still = partial(torch.optim.SGD, lr=0.0)
    for mine, before in zip(_train(theirs, optimizer=still)[1], _Model().parameters(), strict=True):
        expect(torch.equal(mine, before), "With a learning rate of zero the weights change: only the optimizer may.")


def _as_one_step_does(theirs, where, **how):
    """Losses and weights against those of the four lines."""
    (losses, weights, _, _), (right, due, _, _) = _train(theirs, **how), _train(_variant(), **how)
    for a, b in zip(weights, due, strict=True):
        off = (a - b).abs().max().item()
        expect(torch.allclose(a, b, rtol=1e-5, atol=1e-6), f"{where}the weights are up to {off:.2g} away. Is the "
               "gradient that of the mean, and left as it is?")  # fmt: skip
    expect(all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5) for a, b in zip(losses, right, strict=True)),
           f"{where}you return the losses {losses}; they are {right}.")  # fmt: skip
    generated(
        lambda rows, length, vocabulary, stale: _one_step(theirs, rows, length, vocabulary, stale), most=25,
        rows=st.integers(1, 4), length=st.integers(1, 5), vocabulary=st.integers(1, 9), stale=st.booleans(),
    )  # fmt: skip


def _one_step(theirs, rows, length, vocabulary, stale):
    """Plain gradient descent, against the mean of −log p, differentiated in float64."""
    model, lr = _Model(vocabulary), 0.5
    inputs, targets = _tokens(rows, length, vocabulary, torch.Generator().manual_seed(rows))
    weights = [p.detach().double().requires_grad_() for p in model.parameters()]
    embedding, matrix, bias = weights
    logits = embedding[inputs] @ matrix.T + bias
    right = (logits.exp().sum(-1).log() - logits.gather(-1, targets[..., None])[..., 0]).sum() / (rows * length)
    gradients = torch.autograd.grad(right, weights)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if stale else None
    found = theirs(model, torch.optim.SGD(model.parameters(), lr=lr), inputs, targets)
    where = (
        f"{rows} rows of {length} tokens, a vocabulary of {vocabulary}, {'old' if stale else 'no'} gradients there: "
    )
    expect(isinstance(found, float), f"{where}your function returns a {type(found).__name__}; a float is asked for.")
    expect(abs(found - right.item()) < 1e-5, f"{where}your loss is {found:.6g}; it should be {right.item():.6g}.")
    for p, w, g in zip(model.parameters(), weights, gradients, strict=True):
        off = (p.detach() - (w - lr * g)).abs().max().item()
        expect(off < 1e-5, f"{where}after a step of SGD a weight is {off:.2g} from where it should be.")
