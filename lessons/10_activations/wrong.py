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
    return [event for event in events if event["ph"] == "X" and event.get("cat") == "cpu_op"]


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


@wrong_attempt("layer_bytes", says="scores are of one row")
def one_rows_scores(rows, length, width, heads, fused):
    return 34 * rows * length * width + (0 if fused else 5 * heads * length**2)


@wrong_attempt("layer_bytes", says="That is the input of the layer alone")
def input_alone(rows, length, width, heads, fused):
    return 2 * rows * length * width


@wrong_attempt("checkpointed_bytes", says="but not the inputs that all the others keep")
def one_layer(layers, rows, length, width):
    return 34 * rows * length * width


@wrong_attempt("checkpointed_bytes", says="only one is there at a time")
def everything_again(layers, rows, length, width):
    return 36 * layers * rows * length * width


@wrong_attempt("fit_rows", says="the other way round")
def exchanged(rows, per_row, rest, room):
    for accumulation in range(1, rows + 1):
        if rows % accumulation == 0 and rest + rows // accumulation * per_row <= room:
            return accumulation, rows // accumulation
    raise ValueError


@wrong_attempt("fit_rows", says="a ValueError is asked for")
def never_refuses(rows, per_row, rest, room):
    for accumulation in range(1, rows + 1):
        if rows % accumulation == 0 and rest + rows // accumulation * per_row <= room:
            return rows // accumulation, accumulation
    return 1, rows


def _function(before_backward, calls=1, leaf_only=False):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, block, x):
            ctx.block = block
            ctx.save_for_backward(x)
            return block(x)

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            inner = x if leaf_only else x.detach().requires_grad_()
            with torch.enable_grad():
                for _ in range(calls):
                    output = ctx.block(inner)
            before_backward(ctx.block)
            inputs = (inner, *ctx.block.parameters())
            if leaf_only:
                grads = torch.autograd.grad(output, inputs, gradient)
                for p, g in zip(ctx.block.parameters(), grads[1:], strict=True):
                    p.grad = g if p.grad is None else p.grad + g
                return None, grads[0]
            output.backward(gradient)
            return None, inner.grad

    return Function.apply


def _clear(block):
    for p in block.parameters():
        p.grad = None


@wrong_attempt("fit_rows", says="whole numbers (int)")
def in_floats(rows, per_row, rest, room):
    for accumulation in range(1, rows + 1):
        if rows % accumulation == 0 and rest + rows // accumulation * per_row <= room:
            return rows / accumulation, accumulation
    raise ValueError


@wrong_attempt("checkpoint", says="not replaced (and nothing cleared)")
def gradients_replaced(block, x):
    return _function(_clear)(block, x)


@wrong_attempt("checkpoint", says="In all the block is called 3 times")
def called_three_times(block, x):
    return _function(lambda block: None, calls=2)(block, x)


@wrong_attempt("checkpoint", says="torch.utils.checkpoint")
def torchs_own(block, x):
    return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)


class _OnlyLeaves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, x):
        ctx.block, ctx.x = block, x
        return block(x)

    @staticmethod
    def backward(ctx, gradient):
        before = ctx.x.grad
        ctx.x.grad = None
        with torch.enable_grad():
            ctx.block(ctx.x).backward(gradient)
        found, ctx.x.grad = ctx.x.grad, before
        return None, found


@wrong_attempt("checkpoint", says="behind a layer")
def only_where_x_is_a_leaf(block, x):
    return _OnlyLeaves.apply(block, x)


def _gradients(hidden, weight, targets, chunk):
    """Loss and gradients, a chunk at a time."""
    total, dh, dw = 0.0, [], torch.zeros_like(weight)
    for some, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        probabilities = (some @ weight.T).log_softmax(-1)
        total = total - probabilities.gather(1, wanted[:, None]).sum()
        probabilities = probabilities.exp()
        probabilities[torch.arange(len(wanted)), wanted] -= 1
        dh.append(probabilities @ weight / len(targets))
        dw += probabilities.T @ some / len(targets)
    return total / len(targets), torch.cat(dh), dw


class _IncomingForgotten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        loss, dh, dw = _gradients(hidden, weight, targets, chunk)
        ctx.save_for_backward(dh, dw)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        return *ctx.saved_tensors, None, None


@wrong_attempt("chunked_loss", says="the gradient that comes in has to be multiplied with")
def incoming_forgotten(hidden, weight, targets, chunk):
    return _IncomingForgotten.apply(hidden, weight, targets, chunk)


@wrong_attempt("chunked_loss", says="Checkpoint each chunk")
def the_other_way_round(hidden, weight, targets, chunk):
    total = 0.0
    for some, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = weight @ some.T
        total = total - logits.log_softmax(0)[wanted, torch.arange(len(wanted))].sum()
    return total / len(targets)


@wrong_attempt("chunked_loss", says="Let each go before the next is made")
def all_chunks_first(hidden, weight, targets, chunk):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            logits = [some @ weight.T for some in hidden.split(chunk)]
            _, dh, dw = _gradients(hidden, weight, targets, chunk)
            ctx.save_for_backward(dh, dw)
            parts = zip(logits, targets.split(chunk), strict=True)
            return sum(F.cross_entropy(part, wanted, reduction="sum") for part, wanted in parts) / len(targets)

        @staticmethod
        def backward(ctx, gradient):
            dh, dw = ctx.saved_tensors
            return gradient * dh, gradient * dw

    return Function.apply(hidden, weight)


def _by_stack(events, key, ends=lambda end, start: end <= start):
    found, stacks = {}, {}
    for event in sorted(_operators(events), key=key):
        stack = stacks.setdefault(event["tid"], [])
        while stack and ends(stack[-1]["ts"] + stack[-1]["dur"], event["ts"]):
            stack.pop()
        if stack:
            found[stack[-1]["name"]] -= event["dur"] / 1e3
        found[event["name"]] = found.get(event["name"], 0) + event["dur"] / 1e3
        stack.append(event)
    return found


@wrong_attempt("self_ms", says="also where both start")
def by_start_alone(events):
    return _by_stack(events, lambda event: event["ts"])


@wrong_attempt("self_ms", says="also where both start, or both end")
def ends_with_its_caller(events):
    operators, found = sorted(_operators(events), key=lambda event: (event["ts"], -event["dur"])), {}
    for i, event in enumerate(operators):
        found[event["name"]] = found.get(event["name"], 0) + event["dur"] / 1e3
        around = [o for o in operators[:i] if _inside(event, o) and o["ts"] + o["dur"] > event["ts"] + event["dur"]]
        if around:
            found[around[-1]["name"]] -= event["dur"] / 1e3
    return found


@wrong_attempt("self_ms", says="Your function has changed")
def sorts_the_callers_list(events):
    events.sort(key=lambda event: (event.get("ts", 0), -event.get("dur", 0)))
    return _by_stack(events, lambda event: 0)


@wrong_attempt("fit_rows", says="you ")
def in_whole_bytes(rows, per_row, rest, room):
    for accumulation in range(1, rows + 1):
        micro_batch = rows // accumulation
        if micro_batch * accumulation == rows and int(rest) + micro_batch * int(per_row) <= int(room):
            return micro_batch, accumulation
    raise ValueError("not even one row fits")


@wrong_attempt("chunked_loss", says="and logits of some hundreds")
def without_the_largest(hidden, weight, targets, chunk):
    def part(some, weight, wanted):
        logits = some @ weight.T
        return (logits.exp().sum(-1).log() - logits.gather(-1, wanted[:, None])[:, 0]).sum()

    total = hidden.new_zeros(())
    for some, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total = total + torch.utils.checkpoint.checkpoint(part, some, weight, wanted, use_reentrant=False)
    return total / len(targets)


@wrong_attempt("self_ms", says="you say")
def in_whole_microseconds(events):
    return {name: round(ms, 3) for name, ms in _by_stack(events, lambda e: (e["ts"], -e["dur"])).items()}
