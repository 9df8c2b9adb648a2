"""Wrong attempts at lesson 9, and what their message must say."""

import math

from lessons.checking import wrong_attempt


def _states(parameters, ranks, **other):
    psi = parameters / 1e9
    right = {"ddp": 16, "fsdp": 16 / ranks, "zero1": 2 + 14 / ranks, "zero2": 2 + 14 / ranks, "zero3": 16 / ranks}
    return {name: each * psi for name, each in {**right, **other}.items()}


@wrong_attempt("states_gb", says="FSDP has no master weights")
def masters_everywhere(parameters, ranks):
    return _states(parameters, ranks, fsdp=20 / ranks)


@wrong_attempt("states_gb", says="gradients are gone in stage 1 too")
def the_papers_first_stage(parameters, ranks):
    return _states(parameters, ranks, zero1=4 + 12 / ranks)


@wrong_attempt("states_gb", says="master weights are missing")
def no_masters(parameters, ranks):
    return _states(parameters, ranks, zero1=2 + 10 / ranks)


@wrong_attempt("states_gb", says="GiB (2³⁰ bytes) where GB")
def gibibytes(parameters, ranks):
    return {name: gb * 1e9 / 2**30 for name, gb in _states(parameters, ranks).items()}


@wrong_attempt("largest_model", says="More ranks do not help DDP")
def all_memory_together(room, ranks):
    return dict.fromkeys(("ddp", "zero2", "fsdp"), ranks * room / 16)


@wrong_attempt("largest_model", says="Gradients are sharded in stage 2")
def stage_one(room, ranks):
    return {"ddp": room / 16, "zero2": room / (4 + 12 / ranks), "fsdp": ranks * room / 16}


@wrong_attempt("largest_model", says="does not use the other ranks' memory")
def as_if_alone(room, ranks):
    return {"ddp": room / 16, "zero2": room / (2 + 14 / ranks), "fsdp": room / 16}


def _sent(parameters, ranks, a, **other):
    passed = {"ddp": 8, "fsdp": 4 * a + 4, "zero1": 6, "zero2": 4 * a + 2, "zero3": 6 * a, **other}
    return {name: each * parameters * (ranks - 1) / ranks for name, each in passed.items()}


@wrong_attempt("wire_bytes", says="two passes of the ring")
def one_pass(parameters, ranks, accumulation):
    return _sent(parameters, ranks, accumulation, ddp=4)


@wrong_attempt("wire_bytes", says="Stage 2 reduces at every micro-batch")
def held_back(parameters, ranks, accumulation):
    return _sent(parameters, ranks, accumulation, zero2=6)


@wrong_attempt("wire_bytes", says="Every micro-batch gathers the parameters anew")
def gathered_once(parameters, ranks, accumulation):
    return _sent(parameters, ranks, accumulation, fsdp=8)


@wrong_attempt("wire_bytes", says="That is the payload")
def payload(parameters, ranks, accumulation):
    return {name: sent * ranks / (ranks - 1) for name, sent in _sent(parameters, ranks, accumulation).items()}


@wrong_attempt("choose", says="it does not fit")
def least_traffic(memory, sent, room):
    return min(memory, key=lambda name: (sent[name], memory[name]))


@wrong_attempt("choose", says="more than zero2, which fits too")
def least_memory(memory, sent, room):
    return min((name for name in memory if memory[name] <= room), key=lambda name: memory[name], default=None)


@wrong_attempt("choose", says="of these, zero2 holds less")
def ties_by_order(memory, sent, room):
    return min((name for name in memory if memory[name] <= room), key=lambda name: sent[name], default=None)


@wrong_attempt("choose", says="exactly what there is")
def strictly_below(memory, sent, room):
    fitting = [name for name in memory if memory[name] < room]
    return min(fitting, key=lambda name: (sent[name], memory[name]), default=None)


def _apart(losses, difference, first_step=1):
    (_, reference), *others = losses.items()
    worst = ("", 0, -1.0)
    for name, curve in others:
        for step, (loss, other) in enumerate(zip(curve, reference, strict=True), start=first_step):
            if difference(loss, other) > worst[2]:
                worst = (name, step, difference(loss, other))
    return worst


@wrong_attempt("worst_difference", says="passed over")
def nan_is_overlooked(losses):
    return _apart(losses, lambda loss, reference: abs(loss - reference) / reference)


@wrong_attempt("worst_difference", says="absolute difference")
def absolute(losses):
    return _apart(losses, lambda loss, reference: math.inf if math.isnan(loss) else abs(loss - reference))


@wrong_attempt("worst_difference", says="Steps count from 1")
def from_zero(losses):
    return _apart(
        losses, lambda loss, reference: math.inf if math.isnan(loss) else abs(loss - reference) / reference, 0
    )


@wrong_attempt("states_gb", says="Under DDP every rank holds all")
def everything_sharded(parameters, ranks):
    return {name: 16 * parameters / 1e9 / ranks for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")}


@wrong_attempt("largest_model", says="has master weights, 20 bytes")
def with_masters(room, ranks):
    return {"ddp": room / 16, "zero2": room / (2 + 14 / ranks), "fsdp": ranks * room / 20}


@wrong_attempt("largest_model", says="room for parameters alone")
def parameters_only(room, ranks):
    return {"ddp": room / 4, "zero2": room / (2 + 14 / ranks), "fsdp": ranks * room / 16}


@wrong_attempt("wire_bytes", says="4 bytes")
def fsdp_reduces_in_bf16(parameters, ranks, accumulation):
    return _sent(parameters, ranks, accumulation, fsdp=4 * accumulation + 2)


@wrong_attempt("choose", says="which needs 25.2: it does not fit")
def always_something(memory, sent, room):
    fitting = [name for name in memory if memory[name] <= room]
    return min(fitting or memory, key=lambda name: (sent[name], memory[name]))


def _difference(loss, reference):
    return math.inf if math.isnan(loss) else abs(loss - reference) / reference


@wrong_attempt("worst_difference", says="the first entry is the reference, whatever its name")
def ddp_is_the_reference(losses):
    return _apart({"ddp": losses["ddp"], **losses}, _difference)


@wrong_attempt("worst_difference", says="All agree")
def nothing_where_all_agree(losses):
    found = _apart(losses, _difference)
    return found if found[2] > 0 else ("", 0, 0.0)


@wrong_attempt("worst_difference", says="Your function has changed `losses`")
def takes_the_reference_out(losses):
    first = next(iter(losses))
    reference = losses.pop(first)
    return _apart({first: reference, **losses}, _difference)


@wrong_attempt("choose", says="but another fits and sends")
def nearly_the_same_is_the_same(memory, sent, room):
    fitting = [name for name in memory if memory[name] <= room]
    least = min((sent[name] for name in fitting), default=0)
    return min((name for name in fitting if sent[name] <= 1.0001 * least), key=memory.get, default=None)


@wrong_attempt("worst_difference", says="it is (")
def divided_by_one_at_least(losses):
    return _apart(losses, lambda loss, reference: _difference(loss, reference) * reference / max(reference, 1.0))
