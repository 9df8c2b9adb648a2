"""Checks of lesson 6. Those with ranks run on every rank."""

import torch
import torch.distributed as dist

from lessons.cases import formula, generated, st
from lessons.checking import Wrong, expect, expect_number, is_whole, rounded_alike
from lessons.meters import on_all_wires, unwritten_is_nan
from lessons.worlds import on_two_ranks
from strategies.ledger.wire import Meter

PARAMETERS = st.integers(0, 10**10)


def rank_bytes(theirs):
    for p, ranks in ((7_500_000_000, 64), (124_000_000, 6), (124_000_000, 8)):
        mistakes = {
            "That is DDP: nothing is divided by the ranks.": 16 * p,
            "That is ZeRO-1, with whole gradients. ZeRO-2 keeps those of its slice.": 4 * p + 12 * p / ranks,
            "The parameters are divided as well: that is ZeRO-3.": 16 * p / ranks,
            "The master weights are missing: bf16 parameters need a float32 copy to be updated.": (
                2 * p + 10 * p / ranks
            ),
            "One of AdamW's two moments is missing.": 2 * p + 10 * p / ranks,
            "The gradients are missing: the slice of them that this rank needs stays.": 2 * p + 12 * p / ranks,
            "The master weights have 2 bytes there; they are float32, 4.": 2 * p + 12 * p / ranks,
            "The parameters are missing: they are whole on every rank.": 14 * p / ranks,
            "That has float32 parameters and gradients: 4 + 4 in place of 2 + 2.": 4 * p + 16 * p / ranks,
            "The gradients of a slice are in float32 there; they are bf16, 2 bytes.": 2 * p + 16 * p / ranks,
        }
        what = f"{p:,} parameters on {ranks} ranks, in bytes"
        expect_number(theirs(p, ranks), 2 * p + 14 * p / ranks, what, mistakes, ranks)
    formula(
        theirs, lambda p, n: p * (2 + (2 + 4 + 4 + 4) / n), "in bytes", "ranks",
        parameters=PARAMETERS, ranks=st.integers(1, 64),
    )  # fmt: skip


def wire_bytes(theirs):
    for p, ranks, accumulation, scattered in (
        (7 * 10**9, 6, 4, True),
        (124_000_000, 8, 3, False),
        (124_000_000, 6, 1, True),
    ):
        once = (ranks - 1) / ranks * 2 * p
        reduced = accumulation * (1 if scattered else 2)
        mistakes = {
            "The gathering of the updated parameters is missing.": reduced * once,
            "The parameters are gathered: one pass of the ring, not two as in an all-reduce.": (reduced + 2) * once,
            "That is the payload; a ring sends (N − 1)/N of it per pass.": (reduced + 1) * 2 * p,
            "That is float32; gradients and parameters travel in bf16 here.": 2 * (reduced + 1) * once,
        }
        if accumulation > 1:
            mistakes |= {
                "Gradients are reduced once there, as in ZeRO-1. ZeRO-2 has nowhere to keep whole gradients until the "
                "last micro-batch: it reduces them after every one.": (reduced / accumulation + 1) * once,
                "Parameters are gathered once a step, after the update, not at every micro-batch.": (
                    reduced + accumulation
                )
                * once,
            }
        if scattered:
            mistakes["A reduction to owners is one pass of the ring, half of an all-reduce."] = (2 * reduced + 1) * once
        else:
            mistakes["An all-reduce is two passes of the ring, not one."] = (reduced / 2 + 1) * once
        words = "reduced to their owners" if scattered else "all-reduced"
        what = f"{p:,} parameters, {ranks} ranks, {accumulation} micro-batches, gradients {words}, in bytes"
        expect_number(theirs(p, ranks, accumulation, scattered), (reduced + 1) * once, what, mistakes, ranks)
    formula(
        theirs, lambda p, n, a, owned: 2 * (p - p / n) * ((a if owned else 2 * a) + 1), "in bytes", "ranks",
        parameters=PARAMETERS, ranks=st.integers(1, 64), accumulation=st.integers(1, 16), to_owners=st.booleans(),
    )  # fmt: skip


def most_gradients(theirs):
    for numels, mine, bucket in (
        ([4, 4, 4, 4, 4, 4], [0, 0, 0, 4, 4, 4], 8),
        ([6, 1, 3, 20, 5, 5], [6, 1, 0, 0, 0, 0], 10),
        ([3, 3, 3, 3], [3, 3, 0, 0], 100),
        ([2, 9, 2, 2], [1, 4, 2, 0], 6),
        ([1, 30, 2, 30], [1, 15, 0, 0], 12),
    ):
        _gradients(theirs, numels, mine, bucket)
    some = st.integers(1, 12).flatmap(lambda numel: st.tuples(st.just(numel), st.integers(0, numel)))
    generated(
        lambda gradients, bucket: _gradients(theirs, [n for n, _ in gradients], [m for _, m in gradients], bucket),
        gradients=st.lists(some, min_size=1, max_size=7), bucket=st.integers(1, 20),
    )  # fmt: skip


def _gradients(theirs, numels, mine, bucket):
    right = _alive(numels, mine, bucket)
    known = {
        "That is all gradients: as if none were freed before the end of backward, as in ZeRO-1.": sum(numels),
        "That is what is left at the end; more is alive in between.": sum(mine),
        "That is what this rank keeps and a full bucket. Not all of it need be there at the same time: walk "
        "through the gradients one by one.": sum(mine) + bucket,
        "You let the waiting gradients go before the new one comes. It is there already: backward made it.": (
            _most(numels, mine, bucket, early=True)
        ),
        "You forget what this rank keeps of the reduced gradients: its own elements stay.": (
            _most(numels, [0] * len(mine), bucket)
        ),
        "You keep this rank's elements apart from the gradients that wait: they are a part of them, and are "
        "counted twice.": _most(numels, mine, bucket, twice=True),
        "Gradients that fill the bucket exactly still fit into it: only one that does not is too many.": (
            _most(numels, mine, bucket - 1)
        ),
        "One larger than the bucket goes in alone, and waits there as any other does until the next one comes.": (
            _most(numels, mine, bucket, large=True)
        ),
    }
    expect_number(
        theirs(list(numels), list(mine), bucket), right,
        f"gradients of {numels} elements, of which this rank keeps {mine}, and a bucket of {bucket}",
        {message: value for message, value in known.items() if value != right},
    )  # fmt: skip


def _alive(numels, mine, bucket):
    """Element by element: those that wait, as (gradient, whether it is this rank's), and those that it has kept."""
    waiting, kept, most = [], [], 0
    for i, (numel, own) in enumerate(zip(numels, mine, strict=True)):
        new = [(i, element < own) for element in range(numel)]
        most = max(most, len(waiting) + len(kept) + len(new))
        if len(waiting) + len(new) > bucket:
            kept += [element for element in waiting if element[1]]
            waiting = []
        waiting += new
    return most


def _most(numels, mine, bucket, early=False, twice=False, large=False):
    """What the usual mistakes give."""
    most = kept = waiting = own = 0
    for numel, some in zip(numels, mine, strict=True):
        if not early:
            most = max(most, kept + waiting + numel + (some if twice else 0))
        if waiting + numel > bucket:
            kept += 0 if twice else own
            waiting = own = 0
        if large and numel > bucket:
            kept += some
            continue
        waiting += numel
        own += some
        if early:
            most = max(most, kept + waiting)
        if twice:
            kept += some
    return most


def owners(theirs):
    for offset, numel, part in ((0, 5, 8), (6, 5, 8), (3, 30, 8), (8, 8, 8), (0, 8, 4), (12, 4, 8)):
        _owners(theirs, offset, numel, part)
    generated(
        lambda offset, numel, part: _owners(theirs, offset, numel, part),
        offset=st.integers(0, 40), numel=st.integers(0, 30), part=st.integers(1, 12),
    )  # fmt: skip


def _owners(theirs, offset, numel, part):
    found = theirs(offset, numel, part)
    whole = isinstance(found, list) and all(
        isinstance(piece, tuple) and len(piece) == 3 and all(map(is_whole, piece)) for piece in found
    )
    expect(whole, f"Your function returned {found!r}; a list of tuples of three integers is asked for.")
    where = f"For {numel} elements from {offset} on, in slices of {part}: "
    of = [(offset + element) // part for element in range(numel)]  # element → its owner
    right = [(rank, of.index(rank), of.index(rank) + of.count(rank)) for rank in sorted(set(of))]
    if found == right:
        return
    for rank, start, stop in found:
        expect(start < stop, where + f"rank {rank} has an empty piece {(start, stop)}; leave it out.")
        if start < 0 or stop > numel:
            raise Wrong(
                where + f"rank {rank} gets elements [{start}, {stop}). They count from the parameter's first "
                "element, not from the buffer's."
            )
    told = [element for _, start, stop in found for element in range(start, stop)]
    if lost := sorted(set(range(numel)) - set(told)):
        raise Wrong(where + f"element {lost[0]} is sent to nobody: its gradient would be lost.")
    expect(len(told) == len(set(told)), where + "some elements are sent to two ranks; every one has one owner.")
    expect(sorted(found) != right, where + f"the owners are not in order: {found}.")
    expect(
        [rank for rank, _, _ in found] == [rank for rank, _, _ in right],
        where + f"you send to the ranks {[rank for rank, _, _ in found]}; the owners are "
        f"{[rank for rank, _, _ in right]}. Rank r's slice begins at r · part.",
    )
    raise Wrong(where + f"you say {found}: the cuts lie at multiples of part in the buffer.")


def to_owners(theirs):
    world_size = dist.get_world_size()
    sizes, owner = [(3,), (5,), (2,), (4,)], [1, 0, 2, 1]
    with Meter() as meter:
        _to_owners(theirs, sizes, owner, 0, meter)
    sent, once = on_all_wires(meter), (world_size - 1) * 4 * sum(map(_numel, sizes))
    expect(
        sent <= once,
        f"The result is right, but it sends {sent / once:g} times what is needed. An all-reduce brings the mean to all "
        "ranks, also to those that drop it; dist.reduce brings it to one.",
    )
    _to_owners(theirs, [(2, 3), (3, 2), (1, 4)], [2, 2, 0], 7)
    on_two_ranks(lambda: _to_owners(theirs, [(2, 3), (4,)], [1, 0], 5))
    shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
    generated(
        lambda gradients, seed: _to_owners(theirs, [shape for shape, _ in gradients], [r for _, r in gradients], seed),
        most=8, gradients=st.lists(st.tuples(shapes, st.integers(0, world_size - 1)), max_size=5),
        seed=st.integers(0, 99),
    )  # fmt: skip


def _numel(shape):
    return int(torch.Size(shape).numel())


def _to_owners(theirs, shapes, owner, seed, meter=None):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    where = "" if meter else f"With shapes {[list(shape) for shape in shapes]} and owners {owner}: "
    every = [
        [torch.randn(shape, generator=torch.Generator().manual_seed(100 * r + i + seed)) for r in range(world_size)]
        for i, shape in enumerate(shapes)
    ]
    gradients = [of[rank].clone() for of in every]
    with unwritten_is_nan():
        answer = theirs(gradients, list(owner))
    expect(answer is None or answer is gradients, where + "Change the list in place: gradients[i] = …")
    expect(
        len(gradients) == len(shapes),
        where + f"The list has {len(gradients)} entries now; put None where one is let go.",
    )
    for i, who in enumerate(owner):
        found, mean = gradients[i], torch.stack(every[i]).mean(0)
        if who != rank:
            expect(
                found is None,
                where + f"Gradient {i} is rank {who}'s, and rank {rank} still holds a tensor for it: its memory is not "
                "saved. Put None in its place.",
            )
            continue
        expect(found is not None, where + f"Gradient {i} is this rank's own and is gone: the owner keeps it.")
        expect(isinstance(found, torch.Tensor), where + f"Gradient {i} is {found!r} now; the mean is asked for.")
        expect(
            found.shape == mean.shape and found.dtype == mean.dtype,
            where + f"Gradient {i} is {found.dtype} {list(found.shape)} now; it was float32 {list(mean.shape)}.",
        )
        if rounded_alike(found, mean, max(each.abs().max().item() for each in every[i])):
            continue
        if torch.allclose(found, mean * world_size, rtol=1e-4, atol=1e-6):
            raise Wrong(where + f"Gradients are world_size ({world_size}) times too large: reduce sums.")
        if torch.allclose(found, every[i][rank], rtol=1e-4):
            raise Wrong(where + "The owner has its own gradient: nothing of the others' rows is in it.")
        if torch.allclose(found, mean / world_size, rtol=1e-4, atol=1e-6):
            raise Wrong(where + f"The mean is divided by the world size ({world_size}) twice.")
        if torch.allclose(found, every[i][rank] / world_size, rtol=1e-4, atol=1e-6):
            raise Wrong(where + "The owner has its own gradient, divided: the sum over the ranks is missing.")
        if meter and len(meter.sent) < len(shapes):
            raise Wrong(
                f"Gradient {i} is not the mean, and this rank has taken part in {len(meter.sent)} of "
                f"{len(shapes)} reductions. Every rank takes part in all of them, also where it lets the result go."
            )
        raise Wrong(where + f"Gradient {i} is up to {(found - mean).abs().max():.2g} away from the mean.")
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gradients if t is not None}
    due = sum(4 * _numel(shape) for shape, who in zip(shapes, owner, strict=True) if who == rank)
    expect(
        sum(kept.values()) <= due,
        where + f"Right, but this rank keeps {sum(kept.values())} bytes for {due}: its gradients are views of "
        "something larger, which stays as long as they do. Copy them (clone).",
    )
