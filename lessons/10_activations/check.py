"""Checks of lesson 10."""

from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from lessons.beside import load_beside
from lessons.cases import formula, generated, st
from lessons.checking import Wrong, expect, expect_number, expect_raises, is_whole, on_behalf
from lessons.meters import Largest, kept


def layer_bytes(theirs):
    for b, s, h, a, fused in ((1, 2048, 4096, 32, False), (8, 1024, 768, 12, True), (4, 512, 768, 12, False)):
        unit, scores = s * b * h, a * s * s * b
        right = 34 * unit + (0 if fused else 5 * scores)
        expect_number(
            theirs(b, s, h, a, fused),
            right,
            f"{b} rows of {s}, width {h}, {a} heads, {'fused' if fused else 'stored scores'}, in bytes",
            {
                "Fused attention stores no scores: the term with length² goes.": 34 * unit + 5 * scores,
                "The scores are missing: there are heads · length² of them per row.": 34 * unit if not fused else -1,
                "The scores are of one head there; every head has its own.": 34 * unit + 5 * s * s * b,
                "5·a·s²·b is bytes already: 2 for scores, 2 for the softmax, 1 for the dropout mask.": (
                    34 * unit + 10 * scores if not fused else 68 * unit
                ),
                "The scores are of one row there.": 34 * unit + 5 * a * s * s,
                "That is the input of the layer alone.": 2 * unit,
                "That is what checkpointing computes again without dropout; the formula asked for has 34.": 32 * unit,
            },
        )
    formula(
        theirs, lambda b, s, h, a, fused: s * b * h * (34 + (0 if fused else 5 * a * s / h)), "in bytes",
        rows=st.integers(1, 64), length=st.integers(1, 8192), width=st.integers(1, 8192), heads=st.integers(1, 64),
        fused=st.booleans(),
    )  # fmt: skip


def checkpointed_bytes(theirs):
    for layers, b, s, h in ((32, 1, 2048, 4096), (12, 8, 1024, 768)):
        unit = s * b * h
        expect_number(
            theirs(layers, b, s, h),
            (2 * layers + 32) * unit,
            f"{layers} layers, {b} rows of {s}, width {h}, in bytes",
            {
                "That is what is kept after forward. In backward one layer at a time computes the rest again, and that "
                "is there too.": 2 * layers * unit,
                "That counts the input of the layer at work twice: its 34 include it.": (2 * layers + 34) * unit,
                "That is without checkpointing.": 34 * layers * unit,
                "That has one layer's activations but not the inputs that all the others keep.": 34 * unit,
                "All layers are computed again, but one after another: only one is there at a time.": 36
                * layers
                * unit,
            },
        )
    formula(
        theirs, lambda layers, b, s, h: layers * 2 * b * s * h + (34 - 2) * b * s * h, "in bytes",
        layers=st.integers(1, 100), rows=st.integers(1, 64), length=st.integers(1, 8192), width=st.integers(1, 8192),
    )  # fmt: skip


def fit_rows(theirs):
    cases = {
        (24, 2.0, 5.0, 22.0): (8, 3),
        (32, 1.0, 10.0, 42.0): (32, 1),
        (32, 1.0, 10.0, 41.9): (16, 2),
        (7, 1.0, 0.0, 6.5): (1, 7),
        (12, 3.0, 1.0, 16.0): (4, 3),
    }
    for (rows, per_row, rest, room), right in cases.items():
        found = theirs(rows, per_row, rest, room)
        where = f"{rows} rows of {per_row} with {rest} beside them in {room}: you say {found}. "
        expect(
            isinstance(found, tuple) and len(found) == 2,
            f"Your function returned {found!r}; a micro-batch and an accumulation are asked for.",
        )
        _whole(found, where)
        if found == right:
            continue
        micro_batch, accumulation = found
        if found == right[::-1]:
            raise Wrong(where + "That is the other way round: (micro_batch, accumulation).")
        if micro_batch != int(micro_batch) or micro_batch * accumulation != rows:
            raise Wrong(
                where + f"{micro_batch} · {accumulation} is not {rows}: equal micro-batches have to divide them."
            )
        if rest + micro_batch * per_row > room:
            beside = " beside the rest" if micro_batch * per_row <= room else ""
            raise Wrong(where + f"{micro_batch} rows do not fit{beside}.")
        raise Wrong(where + f"{right[0]} rows at once fit too: fewer micro-batches waste less.")
    late = "Where not even one row fits you return {found}; a ValueError is asked for."
    expect_raises(lambda: theirs(4, 10.0, 95.0, 100.0), ValueError, late)
    generated(
        lambda rows, each, rest, taken, over: _fits(
            theirs, rows, each / 4, rest / 4, max(0.0, (rest + min(taken, rows) * each) / 4 + over / 64)
        ),
        rows=st.integers(1, 60), each=st.integers(1, 9), rest=st.integers(0, 20), taken=st.integers(0, 60),
        over=st.sampled_from([0, 1, -1, 40]),
    )  # fmt: skip


def _whole(found, where):
    expect(all(map(is_whole, found)), f"{where}Rows and micro-batches are whole numbers (int): divide with //.")


def _fits(theirs, rows, per_row, rest, room):
    fitting = [m for m in range(1, rows + 1) if rows % m == 0 and rest + m * per_row <= room]
    where = f"{rows} rows of {per_row} with {rest} beside them in {room}: you "
    if not fitting:
        expect_raises(
            lambda: theirs(rows, per_row, rest, room), ValueError, where + "say {found}, where not even one row fits."
        )
        return
    try:
        found = theirs(rows, per_row, rest, room)
    except ValueError as error:
        raise Wrong(f"{where}raise a ValueError, but {fitting[-1]} rows at once fit.") from error
    right = fitting[-1], rows // fitting[-1]
    _whole(found, f"{where}say {found}. ")
    expect(found == right, f"{where}say {found}; {right} is the fewest micro-batches.")


class _Block(nn.Module):
    """Counts its calls; keeps two activations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.calls = nn.Linear(6, 24), nn.Linear(24, 6), 0

    def forward(self, x):
        self.calls += 1
        return x + self.down(torch.tanh(self.up(x)))


@contextmanager
def _without_torchs():
    """torch's own checkpointing, however it was imported, is refused."""

    def refuse(*arguments, **keywords):
        raise Wrong("That is torch.utils.checkpoint. Write what it does: an autograd.Function.")

    module = torch.utils.checkpoint
    reentrant = mock.patch.object(module.CheckpointFunction, "apply", refuse)
    with reentrant, mock.patch.object(module, "_checkpoint_without_reentrant_generator", refuse):
        yield


def _start(shape=(5, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def checkpoint(theirs):
    with _without_torchs():
        _one_block(theirs)
        _gradients_there_before(theirs)
        for shape in ((6,), (1, 6), (2, 3, 6), (0, 6)):
            _in_the_middle(theirs, shape, blocks=2)
        _in_the_middle(theirs, (4, 6), blocks=3)
        _frozen(theirs)
        _of_zero(theirs)


def _one_block(theirs):
    block, plain = _Block(), _Block()
    start, weights = _start(), torch.linspace(-1, 2, 30).view(5, 6)
    x, reference = start.clone().requires_grad_(), start.clone().requires_grad_()
    with Largest() as memory:
        output, saved = kept(lambda: theirs(block, x))
        held = memory.alive
    right = plain(reference)
    expect(isinstance(output, torch.Tensor), f"Your function returned {output!r}; the block's output is asked for.")
    expect(output.shape == right.shape and torch.allclose(output, right), "The output is not block(x).")
    called = block.calls
    expect(called == 1, f"The forward pass calls the block {called} times; once is enough.")
    (right * weights).sum().backward()
    if not output.requires_grad:
        raise Wrong("The output has no gradient function: backward would never come here. Use an autograd.Function.")
    own = {p.data_ptr() for p in block.parameters()} | {x.data_ptr()}
    extra = [tensor for tensor in saved if tensor.data_ptr() not in own]
    if extra:
        raise Wrong(
            f"Autograd keeps {len(extra)} tensors beside x and the weights (such as one of shape "
            f"{tuple(extra[0].shape)}): the block's own forward pass is recorded. Run it where nothing is."
        )
    if held > output.untyped_storage().nbytes():
        raise Wrong(
            f"After the forward pass {held} bytes are still there, {output.untyped_storage().nbytes()} of them the "
            "output's: something keeps the block's activations, or a copy of x. Keep x alone, and run the block where "
            "nothing is recorded."
        )
    _backward(output, weights)
    expect(block.calls > called, "The backward pass never calls the block again: whose activations does it use?")
    expect(block.calls == 2, f"In all the block is called {block.calls} times; forward and backward call it once each.")
    if x.grad is None:
        raise Wrong("x gets no gradient: return it from backward (and let the inner copy require one).")
    for (name, p), q in zip(block.named_parameters(), plain.parameters(), strict=True):
        expect(
            p.grad is not None,
            f"{name} gets no gradient: call backward() on the second output, with the gradient that comes in.",
        )
        if torch.allclose(p.grad, 2 * q.grad):
            raise Wrong(f"The gradient of {name} is twice as large: it is added to .grad more than once.")
        expect(
            torch.allclose(p.grad, q.grad, atol=1e-6),
            f"The gradient of {name} is wrong. Does the gradient that backward gets go into output.backward(gradient)?",
        )
    if torch.allclose(x.grad, 2 * reference.grad):
        raise Wrong("The gradient of x is twice as large: it is returned, and added to .grad of x itself too.")
    expect(torch.allclose(x.grad, reference.grad, atol=1e-6), "The gradient of x is wrong; the parameters' are right.")


def _backward(output, weights):
    with on_behalf("the backward pass of what your function returned"):
        (output * weights).sum().backward()


def _gradients_there_before(theirs):
    """Two passes without zero_grad in between, as when micro-batches are accumulated."""
    block, plain = _Block(), _Block()
    for seed in (1, 2):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        mine, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
        _backward(theirs(block, mine), 1.0)
        plain(reference).sum().backward()
    for (name, p), q in zip(block.named_parameters(), plain.parameters(), strict=True):
        expect(
            torch.allclose(p.grad, q.grad, atol=1e-5),
            f"After two backward passes the gradient of {name} is not the sum of both: gradients that are there "
            "already have to be added to, not replaced (and nothing cleared).",
        )


def _in_the_middle(theirs, shape, blocks):
    """x is no leaf: it comes out of a layer, and the result goes into the next block."""
    found = []
    for call in (theirs, lambda block, x: block(x)):
        torch.manual_seed(1)
        before, chain = nn.Linear(6, 6), [_Block() for _ in range(blocks)]
        x = torch.tanh(before(_start(shape)))
        for block in chain:
            x = call(block, x)
        with on_behalf(f"the backward pass of {blocks} checkpointed blocks behind a layer, x of shape {list(shape)}"):
            (x * torch.linspace(-1, 2, x.numel()).view(shape)).sum().backward()
        found.append([p.grad for p in (*before.parameters(), *(p for block in chain for p in block.parameters()))])
    for mine, right in zip(*found, strict=True):
        expect(
            mine is not None and torch.allclose(mine, right, atol=1e-5),
            f"With {blocks} blocks in a row, behind a layer and with x of shape {list(shape)}, gradients are wrong: x "
            "is the result of something else there, and its gradient has to go on to it.",
        )


def _frozen(theirs):
    """A weight that is not trained gets no gradient, and stops none."""
    block = _Block()
    block.up.weight.requires_grad_(False)
    x = _start().requires_grad_()
    _backward(theirs(block, x), 1.0)
    frozen = block.up.weight.grad is None and not block.up.weight.requires_grad
    expect(frozen, "A parameter that does not require a gradient has got one.")
    expect(
        x.grad is not None and block.down.weight.grad is not None, "With one frozen parameter gradients are missing."
    )


def _of_zero(theirs):
    """Where no gradient comes in none goes out, however small."""
    block, x = _Block(), _start().requires_grad_()
    _backward(theirs(block, x), 0.0)
    for name, gradient in (("x", x.grad), *((name, p.grad) for name, p in block.named_parameters())):
        none = gradient is None or not gradient.any()
        expect(none, f"Where the gradient that comes in is zero, that of {name} is not: something is added to it.")


def chunked_loss(theirs):
    generator = torch.Generator().manual_seed(0)
    tokens, width, vocabulary, chunk = 203, 4, 97, 16
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    each = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    right = torch.autograd.grad(each.mean(), (hidden, weight), retain_graph=True)
    with Largest() as forward:
        loss, saved = kept(lambda: theirs(hidden, weight, targets, chunk))
    expect(
        isinstance(loss, torch.Tensor) and loss.dim() == 0, f"Your function returned {loss!r}; a scalar tensor is due."
    )
    expect(loss.dtype == torch.float32, f"Your loss is in {loss.dtype}; float32 is asked for.")
    chunks = each.detach().split(chunk)
    if not torch.allclose(loss, each.mean()):
        for message, value in {
            "That is the mean of the chunks' means. The last chunk is shorter, and its tokens would count more.": (
                torch.stack([part.mean() for part in chunks]).mean()
            ),
            "That is the sum of the chunks' means.": torch.stack([part.mean() for part in chunks]).sum(),
            "That is the sum over all tokens; the mean is asked for.": each.sum(),
            "The tokens of the last, shorter chunk are left out.": torch.cat(chunks[:-1]).mean(),
            "That is the loss of the last chunk alone.": chunks[-1].mean(),
        }.items():
            expect(not torch.allclose(loss, value), message)
        raise Wrong(f"The loss is {loss.item():.6f}; it should be {each.mean().item():.6f}.")
    most = chunk * vocabulary
    expect(
        forward.elements <= most,
        f"There are {forward.elements // vocabulary} rows of logits at once in the forward pass; {chunk} are allowed.",
    )
    own = {tensor.untyped_storage().data_ptr() for tensor in (hidden, weight, targets)}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.dtype == torch.float32}
    kept_rows = sum(size for at, size in storages.items() if at not in own) // (4 * vocabulary)
    if kept_rows > chunk:
        raise Wrong(
            f"Autograd keeps {kept_rows} rows of logits (or their logarithms) for backward, chunk by chunk but all of "
            "them in the end. Checkpoint each chunk."
        )
    _logits_at_once(forward, most, vocabulary, "forward")
    expect(loss.requires_grad, "The loss has no gradient function: nothing could be trained with it.")
    with Largest() as backward, on_behalf("the backward pass of your loss"):
        found = torch.autograd.grad(loss, (hidden, weight), allow_unused=True)
    _logits_at_once(backward, most, vocabulary, "backward")
    for name, mine, other in zip(("hidden", "weight"), found, right, strict=True):
        expect(mine is not None, f"The loss is right, but {name} gets no gradient.")
        expect(torch.allclose(mine, other, atol=1e-6), f"The loss is right, the gradient of {name} is not.")
    generated(
        lambda tokens, chunk, scale, large: _chunked(theirs, tokens, chunk, scale, 300.0 if large else 2.0), most=25,
        tokens=st.integers(1, 20), chunk=st.integers(1, 24), scale=st.sampled_from([1.0, 0.25, -3.0]),
        large=st.booleans(),
    )  # fmt: skip


def _logits_at_once(memory, most, vocabulary, where):
    rows = memory.elements // vocabulary
    chunk = most // vocabulary
    if memory.elements > most:
        raise Wrong(f"There are {rows} rows of logits at once in the {where} pass; {chunk} are allowed.")
    together = memory.live_bytes // (4 * vocabulary)
    if together > 8 * chunk:
        raise Wrong(
            f"In the {where} pass {together} rows of logits and the like are there at the same time, in several "
            f"tensors: chunks of {chunk} rows that are all kept until the end. Let each go before the next is made."
        )


def _chunked(theirs, tokens, chunk, scale, size):
    """Backward with another gradient than one, hidden and weight the results of something else.

    size: of hidden. Where it is large, exp of a logit is infinite, and the loss is not.
    """
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 3, generator=generator, requires_grad=True)
    weight = torch.randn(7, 3, generator=generator, requires_grad=True)
    targets = torch.randint(7, (tokens,), generator=generator)
    where = f"With {tokens} tokens in chunks of {chunk}{', and logits of some hundreds' * (size > 2)}: "
    loss = theirs(hidden * size, weight.tanh(), targets, chunk)
    right = F.cross_entropy((hidden * size) @ weight.tanh().T, targets)
    close = torch.allclose(loss, right, atol=1e-5)
    expect(close, f"{where}the loss is {loss.item():.6f}, not {right.item():.6f}.")
    with on_behalf("the backward pass of your loss, times a number"):
        mine = torch.autograd.grad(loss * scale, (hidden, weight))
    for name, found, due in zip(
        ("hidden", "weight"), mine, torch.autograd.grad(right * scale, (hidden, weight)), strict=True
    ):
        expect(
            torch.allclose(found, due, rtol=1e-4, atol=1e-5 * size),
            f"{where}the gradient of {scale} · loss with respect to {name} is wrong: the gradient that comes in has to "
            "be multiplied with.",
        )


def self_ms(theirs):
    load_beside(__file__, "check_operators").self_ms(theirs)
