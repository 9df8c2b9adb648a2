"""Checks of lesson 9."""

import math

from lessons.cases import formula, generated, st
from lessons.checking import Wrong, expect, expect_numbers, is_number

NAMES = ("ddp", "fsdp", "zero1", "zero2", "zero3")


def states_gb(theirs):
    for parameters, ranks in ((7_000_000_000, 8), (124_000_000, 6), (1_000_000_000, 4)):
        psi = parameters / 1e9
        right = {
            "ddp": 16 * psi,
            "fsdp": 16 * psi / ranks,
            "zero1": 2 * psi + 14 * psi / ranks,
            "zero2": 2 * psi + 14 * psi / ranks,
            "zero3": 16 * psi / ranks,
        }
        masters = "FSDP has no master weights: the optimizer updates its float32 shards; bf16 is gathered only."
        whole = "Parameters stay whole in stages 1 and 2; only stage 3 shards them."
        own = "Just before a step the other ranks' gradients are gone in stage 1 too: 2/N. (In backward they exist.)"
        forgotten = "The float32 master weights are missing: bf16 parameters alone lose small updates (lesson 2)."
        mistakes = {
            "ddp": {
                "That shards something. Under DDP every rank holds all of everything.": 16 * psi / ranks,
                "There are no master weights under DDP: autocast leaves the parameters in float32.": 20 * psi,
                "The optimizer's two moments are missing.": 8 * psi,
            },
            "fsdp": {
                masters: 20 * psi / ranks,
                "That is ZeRO-2: FSDP shards the parameters as well.": 2 * psi + 14 * psi / ranks,
                "Not sharded: FSDP leaves nothing whole between two steps.": 16 * psi,
            },
            "zero1": {
                own: 4 * psi + 12 * psi / ranks,
                whole: 16 * psi / ranks,
                forgotten: 2 * psi + 10 * psi / ranks,
                "The gradients are in bf16 here: 2 bytes.": 2 * psi + 16 * psi / ranks,
            },
            "zero2": {
                own: 4 * psi + 12 * psi / ranks,
                whole: 16 * psi / ranks,
                forgotten: 2 * psi + 10 * psi / ranks,
                "The gradients are in bf16 here: 2 bytes.": 2 * psi + 16 * psi / ranks,
            },
            "zero3": {
                "Parameters are sharded too in stage 3.": 2 * psi + 14 * psi / ranks,
                forgotten: 12 * psi / ranks,
            },
        }
        found = theirs(parameters, ranks)
        expect_numbers(found, right, f"{parameters:,} parameters on {ranks} ranks, in GB", mistakes, ranks)
    formula(theirs, _states, "in GB", "ranks", parameters=st.integers(1, 10**11), ranks=st.integers(1, 64))


def _states(parameters, ranks):
    """Each tensor by itself: parameters, gradients, master weights, moments."""
    float32, bf16 = 4 * parameters / 1e9, 2 * parameters / 1e9
    ours = float32 + float32 + 2 * float32
    deepspeed = bf16 + (bf16 + float32 + 2 * float32) / ranks
    last = (bf16 + bf16 + float32 + 2 * float32) / ranks
    return {"ddp": ours, "fsdp": ours / ranks, "zero1": deepspeed, "zero2": deepspeed, "zero3": last}


def largest_model(theirs):
    for room, ranks in ((60e9, 8), (20e9, 6)):
        right = {"ddp": room / 16, "zero2": room / (2 + 14 / ranks), "fsdp": room * ranks / 16}
        mistakes = {
            "ddp": {
                "More ranks do not help DDP: each of them needs room for everything.": ranks * room / 16,
                "That is room for parameters alone; gradients and moments have to fit beside them.": room / 4,
                "That is the number of bytes, not of parameters.": room,
            },
            "zero2": {
                "Parameters stay whole: 2 bytes of them per parameter do not shrink with the ranks.": ranks * room / 16,
                "Gradients are sharded in stage 2: 2 + 14/N bytes per parameter.": room / (4 + 12 / ranks),
            },
            "fsdp": {
                "That does not use the other ranks' memory: under FSDP a rank holds 1/N of everything.": room / 16,
                "That has master weights, 20 bytes; FSDP has none.": ranks * room / 20,
            },
        }
        what = f"{room / 1e9:.0f} GB on each of {ranks} ranks, in parameters"
        expect_numbers(theirs(room, ranks), right, what, mistakes, ranks)

    def largest(room, ranks):
        each = _states(10**9, ranks)
        return {name: room / each[name] for name in ("ddp", "zero2", "fsdp")}

    formula(theirs, largest, "in parameters", "ranks", room=st.floats(1e6, 1e12), ranks=st.integers(1, 64))


def wire_bytes(theirs):
    for parameters, ranks, a in ((10**9, 8, 3), (124_000_000, 6, 5), (10**9, 8, 1)):
        once = parameters * (ranks - 1) / ranks
        passed = {"ddp": 8, "fsdp": 4 * a + 4, "zero1": 6, "zero2": 4 * a + 2, "zero3": 6 * a}
        right = {name: each * once for name, each in passed.items()}
        every = "is reduced once a step only: micro-batches before the last are held back (no_sync)."
        payload = "That is the payload; a ring sends (N − 1)/N of it per pass."
        mistakes = {
            "ddp": {
                "An all-reduce is two passes of the ring.": 4 * once,
                "DDP reduces gradients in float32 here, though products are in bf16.": 4 * once,
                f"Under DDP a gradient {every}": 8 * a * once,
            },
            "fsdp": {
                f"Under FSDP a gradient {every}": 8 * a * once,
                "Parameters are gathered twice per micro-batch: backward needs them again.": (2 * a + 4) * once,
                "Every micro-batch gathers the parameters anew.": 8 * once,
                "Gradients are reduce-scattered in float32, 4 bytes.": (4 * a + 2) * once,
            },
            "zero1": {
                "In the paper; DeepSpeed's default all-reduces, two passes.": 4 * once,
                f"In stage 1 a gradient {every}": (4 * a + 2) * once,
                "The gathering of the updated parameters is missing.": 4 * once,
            },
            "zero2": {
                "Stage 2 reduces at every micro-batch: there is no room to add up whole gradients.": 6 * once,
                "The parameters are gathered once a step, after the update.": 6 * a * once,
            },
            "zero3": {
                "All of it happens at every micro-batch: nothing whole is kept in between.": 6 * once,
                "Gradients too are reduced at every micro-batch.": (4 * a + 2) * once,
                "Parameters are gathered for forward and again for backward.": 4 * a * once,
            },
        }
        for name, each in passed.items():
            mistakes[name][payload] = each * parameters
        what = f"{parameters:,} parameters on {ranks} ranks with accumulation {a}, in bytes"
        expect_numbers(theirs(parameters, ranks, a), right, what, mistakes, ranks)

    def sent(parameters, ranks, accumulation):
        gather, scatter16, scatter32 = 2 * parameters, 2 * parameters, 4 * parameters
        passed = {
            "ddp": 2 * scatter32,
            "fsdp": accumulation * (gather + gather) + scatter32,
            "zero1": 2 * scatter16 + gather,
            "zero2": accumulation * 2 * scatter16 + gather,
            "zero3": accumulation * (gather + gather + scatter16),
        }
        return {name: each - each / ranks for name, each in passed.items()}

    formula(
        theirs, sent, "in bytes", "ranks",
        parameters=st.integers(1, 10**10), ranks=st.integers(1, 64), accumulation=st.integers(1, 9),
    )  # fmt: skip


def choose(theirs):
    memory = {"ddp": 106.0, "fsdp": 13.3, "zero1": 25.3, "zero2": 25.2, "zero3": 13.2}
    sent = {"ddp": 46.5, "fsdp": 46.2, "zero1": 34.9, "zero2": 34.9, "zero3": 46.2}
    cases = {
        200.0: ("zero2", "zero1 and zero2 send equally little; of these, zero2 holds less"),
        25.2: ("zero2", "zero2 needs exactly what there is, which is enough"),
        20.0: ("zero3", "only fsdp and zero3 fit, and zero3 holds less"),
        13.25: ("zero3", "nothing else fits"),
        5.0: (None, "nothing fits, so None is asked for"),
    }
    for room, (right, why) in cases.items():
        found = theirs(dict(memory), dict(sent), room)
        if found == right:
            continue
        expect(
            found is None or isinstance(found, str) and found in memory,
            f"Your function returned {found!r}; a strategy's name is asked for.",
        )
        where = f"With room for {room} you choose {found}"
        if found is not None and memory[found] > room:
            raise Wrong(f"{where}, which needs {memory[found]}: it does not fit.")
        if found is not None and right is not None and sent[found] > sent[right]:
            raise Wrong(f"{where}, which sends {sent[found]}, more than {right}, which fits too: {why}.")
        raise Wrong(f"{where}, but {why}.")
    sizes = st.dictionaries(st.sampled_from(NAMES), st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=5)
    generated(
        lambda both, room, apart: _chosen(theirs, both, room, apart),
        both=sizes, room=st.integers(0, 6), apart=st.sampled_from([1.0, 0.25, 1e-3]),
    )  # fmt: skip


def _chosen(theirs, both, room, apart):
    """On few numbers, where many are equal. apart: of what is sent, as bytes beside 10⁹. Any of the best will do."""
    unit = 1.0 if apart == 1.0 else 1e9
    room, memory = room * unit, {name: held * unit for name, (held, _) in both.items()}
    # in another order: the two belong together by name
    sent = {name: (0.0 if apart == 1.0 else 1e9) + bytes_ * apart for name, (_, bytes_) in reversed(both.items())}
    found = theirs(memory, sent, room)
    best = min(((sent[n], memory[n]) for n in memory if memory[n] <= room), default=None)
    where = f"Memory {memory}, sent {sent}, room {room}: you choose {found!r}"
    if best is None:
        expect(found is None, f"{where}, but nothing fits, so None is asked for.")
        return
    expect(
        isinstance(found, str) and found in memory,
        f"{where}; a strategy that is there is asked for, and something fits.",
    )
    expect(memory[found] <= room, f"{where}, which needs {memory[found]}: it does not fit.")
    expect((sent[found], memory[found]) == best, f"{where}, but another fits and sends {best[0]} and holds {best[1]}.")


def worst_difference(theirs):
    nan = math.nan
    cases = [
        ({"ddp": [4.0, 2.0, 1.0], "fsdp": [4.0, 2.0, 1.001], "zero1": [4.002, 2.0, 1.0]}, ("fsdp", 3, 0.001)),
        ({"ddp": [4.0, 2.0], "fsdp": [4.0, 2.01], "zero3": [4.04, 1.98]}, ("zero3", 1, 0.01)),
        ({"ddp": [4.0, 2.0], "zero2": [4.0, 1.0], "fsdp": [4.0, 2.1]}, ("zero2", 2, 0.5)),
        ({"ddp": [4.0, 2.0], "fsdp": [9.0, nan], "zero2": [4.0, 2.0]}, ("fsdp", 2, math.inf)),
        ({"single": [4.0, 2.0], "fsdp": [4.0, 2.1]}, ("fsdp", 2, 0.05)),
        ({"fsdp": [4.0, 2.1], "ddp": [4.0, 2.0]}, ("ddp", 2, 0.1 / 2.1)),
        ({"zero1": [4.0, 2.0], "fsdp": [4.0, 2.0], "ddp": [4.0, 2.0]}, ("fsdp", 1, 0.0)),
    ]
    for losses, (name, step, apart) in cases:
        reference_name = next(iter(losses))
        try:
            found = theirs(losses)
        except KeyError as error:
            raise Wrong(f"For {losses} you look for {error}, which is not there: the first entry is the reference, "
                        "whatever its name.") from error  # fmt: skip
        expect(
            isinstance(found, tuple) and len(found) == 3,
            f"Your function returned {found!r}; three things are asked for: strategy, step, difference.",
        )
        if found[0] == name and found[1] == step and _close(found[2], apart):
            continue
        where = f"For {losses} you say {found}. "
        if apart == math.inf:
            raise Wrong(where + "There is a nan, and it was passed over: every comparison with nan is False.")
        if apart == 0:
            raise Wrong(where + f"All agree: the first place of all, {(name, step, apart)}, is due.")
        if found[0] == reference_name:
            raise Wrong(where + "The first curve is the reference; it cannot be apart from itself.")
        if found[:2] == (name, step - 1):
            raise Wrong(where + "Steps count from 1.")
        if found[0] in losses and found[1] in range(1, len(losses[reference_name]) + 1):
            reference, loss = losses[reference_name][found[1] - 1], losses[found[0]][found[1] - 1]
            if _close(found[2], abs(loss - reference)):
                raise Wrong(where + "That is the absolute difference; divide it by the reference's loss.")
            if _close(found[2], (loss - reference) / reference) and loss < reference:
                raise Wrong(where + "A difference has no sign here: abs.")
        if found[:2] == (name, step):
            raise Wrong(where + "The place is right, its difference is not: |loss − reference| / reference.")
        raise Wrong(where + f"{name} at step {step} is {apart:g} of the loss away, which is more.")
    some = st.sampled_from([1.0, 2.0, 4.0, nan, 1e-4, 0.5, 4.001])
    curves = st.integers(1, 4).flatmap(
        lambda n: st.dictionaries(
            st.sampled_from(NAMES),
            st.lists(some, min_size=n, max_size=n),
            min_size=2,
        )
    )
    generated(lambda losses: _furthest(theirs, losses), losses=curves)


def _furthest(theirs, losses):
    reference_name, *others = losses
    losses = {**losses, reference_name: [2.0 if math.isnan(loss) else loss for loss in losses[reference_name]]}
    best = ("", 0, -1.0)
    for name in others:
        for i, loss in enumerate(losses[name]):
            apart = abs(loss - losses[reference_name][i]) / losses[reference_name][i] if loss == loss else math.inf
            if apart > best[2]:
                best = (name, i + 1, apart)
    found = theirs(losses)
    right = isinstance(found, tuple) and len(found) == 3 and found[:2] == best[:2] and _close(found[2], best[2])
    expect(right, f"For {losses} you say {found!r}; it is {best}. (Of several equally far apart the first is due.)")


def _close(found, right):
    return is_number(found) and math.isclose(found, right, rel_tol=1e-6)
