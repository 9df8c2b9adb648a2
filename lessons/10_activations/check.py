"""Checks of lesson 10."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lessons.checking import Wrong, expect, expect_number


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
        if tuple(found) == right:
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
    try:
        found = theirs(4, 10.0, 95.0, 100.0)
    except ValueError:
        return
    raise Wrong(f"Where not even one row fits you return {found}; a ValueError is asked for.")


class _Block(nn.Module):
    """Counts its calls; keeps two activations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.calls = nn.Linear(6, 24), nn.Linear(24, 6), 0

    def forward(self, x):
        self.calls += 1
        return x + self.down(torch.tanh(self.up(x)))


def _kept(run):
    """What `run` returns, and the tensors that autograd keeps of it."""
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return result, saved


def checkpoint(theirs):
    block, plain = _Block(), _Block()
    start = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    weights = torch.linspace(-1, 2, 30).view(5, 6)
    x, reference = start.clone().requires_grad_(), start.clone().requires_grad_()
    output, saved = _kept(lambda: theirs(block, x))
    right = plain(reference)
    expect(isinstance(output, torch.Tensor), f"Your function returned {output!r}; the block's output is asked for.")
    expect(torch.allclose(output, right), "The output is not block(x).")
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
    (output * weights).sum().backward()
    expect(block.calls > called, "The backward pass never calls the block again: whose activations does it use?")
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
    expect(torch.allclose(x.grad, reference.grad, atol=1e-6), "The gradient of x is wrong; the parameters' are right.")


class _Largest(TorchDispatchMode):
    """The most rows of logits in any result."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.vocabulary:
                self.rows = max(self.rows, tensor.shape[0])
        return result


def chunked_loss(theirs):
    generator = torch.Generator().manual_seed(0)
    tokens, width, vocabulary, chunk = 50, 8, 41, 16
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    each = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    right = torch.autograd.grad(each.mean(), (hidden, weight), retain_graph=True)
    with _Largest(vocabulary) as forward:
        loss, saved = _kept(lambda: theirs(hidden, weight, targets, chunk))
    expect(
        isinstance(loss, torch.Tensor) and loss.dim() == 0, f"Your function returned {loss!r}; a scalar tensor is due."
    )
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
    if forward.rows > chunk:
        raise Wrong(f"There are {forward.rows} rows of logits at once in the forward pass; {chunk} are allowed.")
    kept = sum(tensor.shape[0] for tensor in saved if tensor.dim() == 2 and tensor.shape[1] == vocabulary)
    if kept > chunk:
        raise Wrong(
            f"Autograd keeps {kept} rows of logits (or their logarithms) for backward, chunk by chunk but all of them "
            "in the end. Checkpoint each chunk."
        )
    expect(loss.requires_grad, "The loss has no gradient function: nothing could be trained with it.")
    with _Largest(vocabulary) as backward:
        found = torch.autograd.grad(loss, (hidden, weight))
    expect(backward.rows <= chunk, f"There are {backward.rows} rows of logits at once in the backward pass.")
    for name, mine, other in zip(("hidden", "weight"), found, right, strict=True):
        expect(torch.allclose(mine, other, atol=1e-6), f"The loss is right, the gradient of {name} is not.")


def _event(name, ts, dur, tid=1, cat="cpu_op", ph="X"):
    return {"ph": ph, "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}


def self_ms(theirs):
    events = [
        _event("aten::addmm", 1200.0, 500.0),
        _event("aten::linear", 1000.0, 1000.0),
        _event("aten::t", 1050.0, 100.0),
        _event("aten::transpose", 1060.0, 80.0),
        _event("aten::relu", 2000.0, 300.0),
        _event("aten::mm", 1100.0, 2000.0, tid=2),
        _event("aten::linear", 4000.0, 700.0),
        _event("aten::addmm", 4000.0, 600.0),
        _event("step", 900.0, 9000.0, cat="user_annotation"),
        {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 1300.0, "tid": 1},
    ]
    right = {
        "aten::linear": 0.5,
        "aten::addmm": 1.1,
        "aten::t": 0.02,
        "aten::transpose": 0.08,
        "aten::relu": 0.3,
        "aten::mm": 2.0,
    }
    whole = {**right, "aten::linear": 1.7, "aten::t": 0.1}
    found = theirs([dict(event) for event in events])
    expect(isinstance(found, dict), f"Your function returned {found!r}; a dictionary is asked for.")
    if "step" in found or "[memory]" in found:
        raise Wrong('Only operators are asked for: ph "X" and cat "cpu_op". You count a scope or a memory event too.')
    if absent := [name for name in right if name not in found]:
        raise Wrong(f"{absent[0]} is missing.")
    if _same(found, {name: 1000 * value for name, value in right.items()}):
        raise Wrong("Those are microseconds; milliseconds are asked for.")
    if _same(found, whole):
        raise Wrong(
            "Time is counted twice: aten::linear's 1.7 ms contain aten::addmm's 1.1. Take away what the operators that "
            "it called took."
        )
    if _close(found["aten::linear"], 1.7 - 1.1 - 0.1 - 0.08):
        raise Wrong(
            "aten::transpose lies within aten::t, which lies within aten::linear: it is aten::t's to take away, not "
            "aten::linear's too."
        )
    if found["aten::linear"] < 0 or _close(found["aten::linear"], 0.5 - 2.0):
        raise Wrong("aten::mm ran on another thread (tid): nobody on this one waited for it.")
    if _close(found["aten::linear"] + found["aten::addmm"], 0.5 + 0.5) or _close(found["aten::addmm"], 0.6):
        raise Wrong("aten::linear and aten::addmm occur twice: add up all calls of a name.")
    for name, value in right.items():
        if not _close(found[name], value):
            raise Wrong(f"{name}: you say {found[name]:g} ms, it is {value:g}.")
    expect(len(found) == len(right), f"There are entries too many: {sorted(set(found) - set(right))}.")


def _close(a, b):
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def _same(a, b):
    return all(_close(a.get(name, math.inf), value) for name, value in b.items())
