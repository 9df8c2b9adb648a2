"""Wrong attempts at lesson 10, and what their message must say."""

import torch
import torch.nn.functional as F

from lessons.checking import wrong_attempt


@wrong_attempt("layer_bytes", says="The scores are missing")
def always_fused(rows, length, width, heads, fused):
    return 34 * rows * length * width


@wrong_attempt("layer_bytes", says="Fused attention stores no scores")
def never_fused(rows, length, width, heads, fused):
    return 34 * rows * length * width + 5 * heads * rows * length**2


@wrong_attempt("layer_bytes", says="every head has its own")
def one_head(rows, length, width, heads, fused):
    return 34 * rows * length * width + (0 if fused else 5 * rows * length**2)


@wrong_attempt("checkpointed_bytes", says="kept after forward")
def inputs_alone(layers, rows, length, width):
    return 2 * layers * rows * length * width


@wrong_attempt("checkpointed_bytes", says="input of the layer at work twice")
def input_twice(layers, rows, length, width):
    return (2 * layers + 34) * rows * length * width


@wrong_attempt("checkpointed_bytes", says="without checkpointing")
def all_kept(layers, rows, length, width):
    return 34 * layers * rows * length * width


@wrong_attempt("fit_rows", says="do not fit beside the rest")
def rest_forgotten(rows, per_row, rest, room):
    for micro_batch in range(rows, 0, -1):
        if rows % micro_batch == 0 and micro_batch * per_row <= room:
            return micro_batch, rows // micro_batch
    raise ValueError


@wrong_attempt("fit_rows", says="have to divide them")
def not_a_divisor(rows, per_row, rest, room):
    micro_batch = min(rows, int((room - rest) // per_row))
    if micro_batch < 1:
        raise ValueError
    return micro_batch, -(-rows // micro_batch)


@wrong_attempt("fit_rows", says="fewer micro-batches waste less")
def one_at_a_time(rows, per_row, rest, room):
    if rest + per_row > room:
        raise ValueError
    return 1, rows


@wrong_attempt("checkpoint", says="is recorded")
def plain_call(block, x):
    return block(x)


@wrong_attempt("checkpoint", says="no gradient function")
def without_gradients(block, x):
    with torch.no_grad():
        return block(x)


class _Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, gradient):
        inner = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.block(inner)
        return None, torch.autograd.grad(output, inner, gradient)[0]


@wrong_attempt("checkpoint", says="up.weight gets no gradient")
def only_the_input(block, x):
    return _Detached.apply(block, x)


class _Summed(_Detached):
    @staticmethod
    def backward(ctx, gradient):
        inner = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.block(inner).sum().backward()
        return None, inner.grad


@wrong_attempt("checkpoint", says="output.backward(gradient)")
def incoming_gradient_ignored(block, x):
    return _Summed.apply(block, x)


@wrong_attempt("chunked_loss", says="rows of logits at once")
def all_at_once(hidden, weight, targets, chunk):
    return F.cross_entropy(hidden @ weight.T, targets)


def _loop(hidden, weight, targets, chunk, reduction):
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.stack([F.cross_entropy(some @ weight.T, wanted, reduction=reduction) for some, wanted in parts])


@wrong_attempt("chunked_loss", says="Checkpoint each chunk")
def kept_all_the_same(hidden, weight, targets, chunk):
    return _loop(hidden, weight, targets, chunk, "sum").sum() / len(targets)


@wrong_attempt("chunked_loss", says="mean of the chunks' means")
def mean_of_means(hidden, weight, targets, chunk):
    return _loop(hidden, weight, targets, chunk, "mean").mean()


@wrong_attempt("chunked_loss", says="left out")
def last_chunk_lost(hidden, weight, targets, chunk):
    whole = len(targets) // chunk * chunk
    return _loop(hidden[:whole], weight, targets[:whole], chunk, "mean").mean()


def _operators(events):
    return [event for event in events if event["ph"] == "X" and event["cat"] == "cpu_op"]


def _inside(inner, outer):
    if inner is outer or inner["tid"] != outer["tid"]:
        return False
    end, last = inner["ts"] + inner["dur"], outer["ts"] + outer["dur"]
    return outer["ts"] <= inner["ts"] and end <= last


@wrong_attempt("self_ms", says="counted twice")
def whole_durations(events):
    found = {}
    for event in _operators(events):
        found[event["name"]] = found.get(event["name"], 0) + event["dur"] / 1e3
    return found


@wrong_attempt("self_ms", says="aten::t's to take away")
def descendants_too(events):
    operators, found = _operators(events), {}
    for event in operators:
        own = event["dur"] - sum(other["dur"] for other in operators if _inside(other, event))
        found[event["name"]] = found.get(event["name"], 0) + own / 1e3
    return found


@wrong_attempt("self_ms", says="a scope or a memory event")
def everything_counts(events):
    found = {}
    for event in events:
        found[event["name"]] = found.get(event["name"], 0) + event.get("dur", 0) / 1e3
    return found
