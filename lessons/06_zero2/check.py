"""Checks of lesson 6. Those with ranks run on every rank."""

import torch
import torch.distributed as dist

from lessons.checking import Wrong, expect, expect_number
from strategies.ledger.wire import Meter


def rank_bytes(theirs):
    for p, ranks in ((7_500_000_000, 64), (124_000_000, 8)):
        expect_number(
            theirs(p, ranks),
            2 * p + 14 * p / ranks,
            f"{p:,} parameters on {ranks} ranks, in bytes",
            {
                "That is DDP: nothing is divided by the ranks.": 16 * p,
                "That is ZeRO-1, with whole gradients. ZeRO-2 keeps those of its slice.": 4 * p + 12 * p / ranks,
                "The parameters are divided as well: that is ZeRO-3.": 16 * p / ranks,
                "The master weights are missing: bf16 parameters need a float32 copy to be updated.": (
                    2 * p + 10 * p / ranks
                ),
                "The gradients are missing: the slice of them that this rank needs stays.": 2 * p + 12 * p / ranks,
                "The parameters are missing: they are whole on every rank.": 14 * p / ranks,
                "That has float32 parameters and gradients: 4 + 4 in place of 2 + 2.": 4 * p + 16 * p / ranks,
            },
        )


def wire_bytes(theirs):
    for parameters, ranks, accumulation, scattered in ((7 * 10**9, 8, 4, True), (124_000_000, 4, 3, False)):
        once = (ranks - 1) / ranks * 2 * parameters
        reduced = accumulation * (1 if scattered else 2)
        words = "reduced to their owners" if scattered else "all-reduced"
        expect_number(
            theirs(parameters, ranks, accumulation, scattered),
            (reduced + 1) * once,
            f"{parameters:,} parameters, {ranks} ranks, {accumulation} micro-batches, gradients {words}, in bytes",
            {
                "Gradients are reduced once there, as in ZeRO-1. ZeRO-2 has nowhere to keep whole gradients until the "
                "last micro-batch: it reduces them after every one.": (reduced / accumulation + 1) * once,
                "Parameters are gathered once a step, after the update, not at every micro-batch.": (
                    reduced + accumulation
                )
                * once,
                "The gathering of the updated parameters is missing.": reduced * once,
                "A reduction to owners is one pass of the ring, half of an all-reduce.": (2 * reduced + 1) * once
                if scattered
                else -1,
                "An all-reduce is two passes of the ring, not one.": -1 if scattered else (reduced / 2 + 1) * once,
                "That is the payload; a ring sends (N − 1)/N of it per pass.": (reduced + 1) * 2 * parameters,
                "That is float32; gradients and parameters travel in bf16 here.": 2 * (reduced + 1) * once,
                "That is every rank's bytes together; one rank's are asked for.": (reduced + 1) * once * ranks,
            },
        )


def most_gradients(theirs):
    for numels, mine, bucket in (
        ([4, 4, 4, 4, 4, 4], [0, 0, 0, 4, 4, 4], 8),
        ([6, 1, 3, 20, 5, 5], [6, 1, 0, 0, 0, 0], 10),
        ([3, 3, 3, 3], [3, 3, 0, 0], 100),
    ):
        expect_number(
            theirs(list(numels), list(mine), bucket),
            _most(numels, mine, bucket),
            f"gradients of {numels} elements, of which this rank keeps {mine}, and a bucket of {bucket}",
            {
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
            },
        )


def _most(numels, mine, bucket, early=False, twice=False):
    most = kept = waiting = own = 0
    for numel, some in zip(numels, mine, strict=True):
        if not early:
            most = max(most, kept + waiting + numel + (some if twice else 0))
        if waiting + numel > bucket:
            kept += 0 if twice else own
            waiting = own = 0
        waiting += numel
        own += some
        if early:
            most = max(most, kept + waiting)
        if twice:
            kept += some
    return most


def owners(theirs):
    for offset, numel, part in ((0, 5, 8), (6, 5, 8), (3, 30, 8), (8, 8, 8), (0, 8, 4)):
        found = theirs(offset, numel, part)
        expect(isinstance(found, list), f"Your function returned {found!r}; a list of tuples is asked for.")
        found = [tuple(piece) for piece in found]
        where = f"For {numel} elements from {offset} on, in slices of {part}: "
        right = []
        for rank in range(offset // part, (offset + numel - 1) // part + 1):
            right.append((rank, max(rank * part - offset, 0), min((rank + 1) * part - offset, numel)))
        if found == right:
            continue
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
        expect(
            [rank for rank, _, _ in found] == [rank for rank, _, _ in right],
            where + f"you send to the ranks {[rank for rank, _, _ in found]}; the owners are "
            f"{[rank for rank, _, _ in right]}. Rank r's slice begins at r · part.",
        )
        raise Wrong(where + f"you say {found}: the cuts lie at multiples of part in the buffer.")


def to_owners(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    owner, sizes = [1, 0, 2, 1], [3, 5, 2, 4]

    def own(r):
        return [torch.randn(n, generator=torch.Generator().manual_seed(10 * r + i)) for i, n in enumerate(sizes)]

    gradients = own(rank)
    with Meter() as meter:
        answer = theirs(gradients, list(owner))
    expect(answer is None or answer is gradients, "Change the list in place: gradients[i] = …")
    expect(len(gradients) == len(sizes), f"The list has {len(gradients)} entries now; put None where one is let go.")
    for i, who in enumerate(owner):
        every = torch.stack([own(r)[i] for r in range(world_size)])
        mean = every.mean(0)
        if who != rank:
            expect(
                gradients[i] is None,
                f"Gradient {i} is rank {who}'s, and rank {rank} still holds a tensor for it: its memory is not saved. "
                "Put None in its place.",
            )
            continue
        found = gradients[i]
        expect(found is not None, f"Gradient {i} is this rank's own and is gone: the owner keeps it.")
        if torch.allclose(found, mean, rtol=1e-4):
            continue
        if torch.allclose(found, mean * world_size, rtol=1e-4):
            raise Wrong(f"Gradients are world_size ({world_size}) times too large: reduce sums.")
        if torch.allclose(found, every[rank], rtol=1e-4):
            raise Wrong("The owner has its own gradient: nothing of the others' rows is in it.")
        if len(meter.sent) < len(sizes):
            raise Wrong(
                f"Gradient {i} is not the mean, and this rank has taken part in {len(meter.sent)} of "
                f"{len(sizes)} reductions. Every rank takes part in all of them, also where it lets the result go."
            )
        raise Wrong(f"Gradient {i} is up to {(found - mean).abs().max():.2g} away from the mean.")
    sent = sum(s.payload_bytes * (2 if s.collective == "all_reduce" else 1) for s in meter.sent)
    once = 4 * sum(sizes)
    expect(
        sent <= once,
        f"The result is right, but it sends {sent / once:g} times what is needed. An all-reduce brings the mean to all "
        "ranks, also to those that drop it; dist.reduce brings it to one.",
    )
