"""Checks of lesson 7. Those with ranks run on every rank."""

import math

import torch
import torch.distributed as dist

from lessons.checking import Wrong, expect, expect_number
from strategies.ledger.wire import Meter


def rank_bytes(theirs):
    for p, ranks in ((7_500_000_000, 64), (124_000_000, 8)):
        expect_number(
            theirs(p, ranks),
            16 * p / ranks,
            f"{p:,} parameters on {ranks} ranks, in bytes",
            {
                "That is DDP: nothing is divided by the ranks.": 16 * p,
                "That is ZeRO-1: parameters and gradients are divided by the ranks too.": 4 * p + 12 * p / ranks,
                "That is ZeRO-2: the parameters are whole there.": 2 * p + 14 * p / ranks,
                "The master weights are missing: bf16 parameters need a float32 copy to be updated.": 12 * p / ranks,
                "That has float32 parameters and gradients: 4 + 4 in place of 2 + 2.": 20 * p / ranks,
                "A copy of the gathered parameters is in there. They are whole for a moment only, not between steps.": (
                    2 * p + 16 * p / ranks
                ),
            },
        )


def wire_bytes(theirs):
    for parameters, ranks, accumulation, keep in ((7 * 10**9, 8, 4, False), (124_000_000, 4, 3, True)):
        once = (ranks - 1) / ranks * 2 * parameters
        passes = 2 if keep else 3
        words = "kept for backward" if keep else "let go after forward"
        expect_number(
            theirs(parameters, ranks, accumulation, keep),
            accumulation * passes * once,
            f"{parameters:,} parameters, {ranks} ranks, {accumulation} micro-batches, parameters {words}, in bytes",
            {
                "That is one micro-batch. Neither whole gradients nor whole parameters stay until the next one, so "
                "everything is sent at every micro-batch.": passes * once,
                "The gradients are reduced at every micro-batch: there is no room for whole ones.": (
                    accumulation * (passes - 1) + 1
                )
                * once,
                "Parameters are gathered at every micro-batch, not once a step.": (accumulation + passes - 1) * once,
                "Parameters that were let go after forward are gathered again for backward.": (
                    -1 if keep else accumulation * 2 * once
                ),
                "Parameters that are kept are gathered once per micro-batch.": accumulation * 3 * once if keep else -1,
                "Gradients are reduce-scattered, one pass of the ring; an all-reduce would be two.": (
                    accumulation * (passes + 1) * once
                ),
                "That is the payload; a ring sends (N − 1)/N of it per pass.": accumulation * passes * 2 * parameters,
                "That is float32; gradients and parameters travel in bf16 here.": 2 * accumulation * passes * once,
            },
        )


def most_gathered(theirs):
    for numels, ahead in (([5, 1, 6, 2, 7, 3], 1), ([5, 1, 1, 7, 2, 3], 0), ([4, 4, 9], 2), ([1, 2, 10, 1], 2)):
        windows = [numels[i : i + ahead + 1] for i in range(len(numels))]
        expect_number(
            theirs(list(numels), ahead),
            max(sum(window) for window in windows),
            f"modules of {numels} elements and {ahead} gathered ahead",
            {
                "That is all of them: as if none were let go after its use.": sum(numels),
                "That is the largest module by itself; those gathered ahead are whole at the same time.": max(numels),
                "That counts one module too few: the one that runs and those ahead of it.": (
                    max(sum(window[:-1]) for window in windows) if ahead else -1
                ),
                "That counts one module too many: what has run is let go before the next one begins.": max(
                    sum(numels[i : i + ahead + 2]) for i in range(len(numels))
                ),
                "That is the ahead + 1 largest modules. Only neighbours are whole at the same time.": sum(
                    sorted(numels)[-ahead - 1 :]
                ),
            },
        )


def _cut(parameter, rank, world_size):
    part = math.ceil(parameter.numel() / world_size)
    flat = torch.zeros(part * world_size)
    flat[: parameter.numel()] = parameter.flatten()
    return flat[rank * part : (rank + 1) * part].clone()


def cut(theirs):
    for shape, world_size in (((4, 3), 2), ((5, 3), 2), ((7,), 3), ((2,), 4)):
        parameter = torch.arange(1.0, math.prod(shape) + 1).view(shape)
        before = parameter.clone()
        parts = [theirs(parameter, rank, world_size) for rank in range(world_size)]
        expect(torch.equal(parameter, before), "The parameter has changed; cut out a copy.")
        right = [_cut(parameter, rank, world_size) for rank in range(world_size)]
        where = f"A parameter of {list(shape)} on {world_size} ranks: "
        for rank, (part, due) in enumerate(zip(parts, right, strict=True)):
            expect(isinstance(part, torch.Tensor), f"Your function returned {part!r}; a tensor is asked for.")
            if part.dim() != 1:
                raise Wrong(where + f"your part has the shape {list(part.shape)}; flatten the parameter first.")
            if part.numel() < due.numel() and all(p.numel() == parts[0].numel() for p in parts):
                raise Wrong(
                    where + f"{part.numel() * world_size} elements are on all ranks together: the rest is lost. Round "
                    "the part up, not down, and pad."
                )
            if part.numel() != due.numel():
                raise Wrong(
                    where + f"rank {rank} has {part.numel()} elements, and all should have {due.numel()}: collectives "
                    "like all_gather want equal parts. Fill up with zeros."
                )
            if part.untyped_storage().nbytes() > 4 * due.numel():
                raise Wrong(
                    where + "your part is a view into the whole parameter, which can never be freed as long as the "
                    "part lives. Return a copy (clone)."
                )
            expect(torch.equal(part, due), where + f"rank {rank} has {part.tolist()}, it should be {due.tolist()}.")


def whole(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for shape in ((7,), (5, 2), (4, 3)):
        right = torch.arange(1.0, math.prod(shape) + 1).view(shape)
        found = theirs(_cut(right, rank, world_size), shape)
        expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
        if found.numel() > right.numel():
            raise Wrong(
                f"{found.numel()} elements for a parameter of {list(shape)}: the padding at the end has to be cut off."
            )
        expect(found.numel() == right.numel(), f"{found.numel()} elements for a parameter of {list(shape)}.")
        expect(tuple(found.shape) == shape, f"The shape is {list(found.shape)}, and should be {list(shape)}.")
        if not torch.equal(found, right):
            raise Wrong(f"The elements are in another order: {found.flatten().tolist()}. Parts lie rank after rank.")


def linear_backward(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shape = (4, 5)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(100))
    every = []
    for r in range(world_size):
        generator = torch.Generator().manual_seed(r)
        every.append((torch.randn(6, 5, generator=generator), torch.randn(6, 4, generator=generator)))
    x, upstream = every[rank]
    with Meter() as meter:
        answer = theirs(x.clone(), upstream.clone(), _cut(weight, rank, world_size), shape)
    expect(
        isinstance(answer, tuple) and len(answer) == 2,
        f"Your function returned {type(answer).__name__}; the gradient of x and a part of W's are asked for.",
    )
    of_x, part = answer
    expect(
        of_x.shape == x.shape,
        f"The gradient of x has the shape {list(of_x.shape)}; x has {list(x.shape)}. It is upstream · W.",
    )
    expect(torch.allclose(of_x, upstream @ weight, atol=1e-5), "The gradient of x is wrong: it is upstream · W.")
    gradients = torch.stack([up.T @ its for its, up in every])
    mean = gradients.mean(0)
    right = _cut(mean, rank, world_size)
    if part.numel() == mean.numel():
        raise Wrong("You return the whole gradient of W. This rank updates its part, and keeps no more.")
    expect(
        part.numel() == right.numel(),
        f"Your part of W's gradient has {part.numel()} elements; the part of W has {right.numel()}, with padding.",
    )
    part = part.flatten()
    if not torch.allclose(part, right, atol=1e-5):
        for message, value in {
            f"Your part is world_size ({world_size}) times too large: reduce_scatter sums.": right * world_size,
            "Your part comes from this rank's rows alone: nothing was reduced over the ranks.": _cut(
                gradients[rank], rank, world_size
            ),
            "Your part comes from this rank's rows alone, divided: the sum over the ranks is missing.": _cut(
                gradients[rank] / world_size, rank, world_size
            ),
            "That is rank 0's part on every rank.": _cut(mean, 0, world_size),
        }.items():
            expect(not torch.allclose(part, value, atol=1e-5), message)
        raise Wrong(f"Your part of W's gradient is up to {(part - right).abs().max():.2g} away from the mean.")
    if any(sent.collective == "all_reduce" for sent in meter.sent):
        raise Wrong(
            "The result is right, but an all-reduce brings the whole mean gradient to every rank, at twice the bytes. "
            "A reduce-scatter leaves each its part."
        )
