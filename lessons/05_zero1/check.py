"""Checks of lesson 5. Those with ranks run on every rank."""

import math

import torch
import torch.distributed as dist

from lessons.checking import Wrong, expect, expect_number


def rank_bytes(theirs):
    for parameters, ranks in ((7_500_000_000, 64), (124_000_000, 8)):
        p = parameters
        expect_number(
            theirs(p, ranks),
            4 * p + 12 * p / ranks,
            f"{p:,} parameters on {ranks} ranks, in bytes",
            {
                "That is DDP: the optimizer's 12 bytes per parameter have to be divided by the ranks.": 16 * p,
                "Everything is divided by the ranks there: that is ZeRO-3. ZeRO-1 leaves parameters and gradients "
                "whole.": 16 * p / ranks,
                "The gradients are divided as well: that is ZeRO-2.": 2 * p + 14 * p / ranks,
                "The master weights are missing: bf16 parameters need a float32 copy to be updated.": (
                    4 * p + 8 * p / ranks
                ),
                "The master weights are whole; only their owner updates them, so they are divided too.": (
                    8 * p + 8 * p / ranks
                ),
                "That is the optimizer's part alone.": 12 * p / ranks,
                "That has float32 parameters and gradients: 4 + 4 in place of 2 + 2.": 8 * p + 12 * p / ranks,
            },
        )


def wire_bytes(theirs):
    for parameters, ranks, scattered in ((7 * 10**9, 8, True), (124_000_000, 4, False)):
        once = (ranks - 1) / ranks * 2 * parameters
        passes = 2 if scattered else 3
        words = "reduce-scattered" if scattered else "all-reduced"
        expect_number(
            theirs(parameters, ranks, scattered),
            passes * once,
            f"{parameters:,} parameters on {ranks} ranks, gradients {words}, in bytes",
            {
                "The gathering of the updated parameters is missing.": once if scattered else -1,
                "An all-reduce is a reduce-scatter and an all-gather: two passes of the ring, not one.": 2 * once,
                "A reduce-scatter is one pass of the ring, half of an all-reduce.": 3 * once,
                "That is the payload; a ring sends (N − 1)/N of it per pass.": passes * 2 * parameters,
                "That is float32; gradients and parameters travel in bf16 here.": 2 * passes * once,
                "That is every rank's bytes together; one rank's are asked for.": passes * once * ranks,
            },
        )


def pieces(theirs):
    for numels, world_size in (([8], 2), ([5, 1, 6], 3), ([7, 2, 10, 3], 4), ([3], 3)):
        part = math.ceil(sum(numels) / (2 * world_size)) * 2
        told = []
        for rank in range(world_size):
            found = theirs(list(numels), rank, world_size)
            expect(isinstance(found, list), f"Your function returned {found!r}; a list of tuples is asked for.")
            told.append([tuple(piece) for piece in found])
        where = f"For parameters of {numels} elements on {world_size} ranks: "
        count = [[0] * numel for numel in numels]
        for rank, found in enumerate(told):
            for i, start, stop in found:
                expect(start < stop, where + f"rank {rank} has an empty piece {(i, start, stop)}; leave it out.")
                if stop > numels[i] or start < 0:
                    raise Wrong(
                        where + f"rank {rank} has elements [{start}, {stop}) of parameter {i}. A piece counts from its "
                        "parameter's first element, not from the buffer's, and ends with it: padding is no piece."
                    )
                for element in range(start, stop):
                    count[i][element] += 1
        if any(times > 1 for one in count for times in one):
            raise Wrong(where + "elements are updated on several ranks: slices must not overlap.")
        if lost := sum(times == 0 for one in count for times in one):
            raise Wrong(where + f"{lost} elements are updated nowhere: they would keep their first values for ever.")
        for rank, found in enumerate(told):
            held = sum(stop - start for _, start, stop in found)
            right = min(max(sum(numels) - rank * part, 0), part)
            expect(
                held == right,
                where + f"rank {rank} has {held} elements where {right} are due. Slices are equal, of {part} elements "
                "with the padding (a multiple of 2 · world_size in all), and cut through parameters.",
            )


def _same(a, b):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-6)


def clip_norm(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    whole = torch.arange(1.0, 4 * world_size + 1)
    mine = whole.chunk(world_size)[rank].clone()
    found = theirs(mine.clone())
    expect(isinstance(found, (int, float)), f"Your function returned {found!r}; a plain number is asked for.")
    norms = torch.stack([part.norm() for part in whole.chunk(world_size)])
    for message, value in {
        "That is the norm of this rank's slice: every rank would scale by its own factor.": mine.norm(),
        "That is the sum of the ranks' norms. Norms do not add up; their squares do.": norms.sum(),
        "That is the square of the norm: the root is missing.": whole.norm() ** 2,
        "That is the mean of the ranks' norms; the norm of the whole is asked for.": norms.mean(),
        "The squares are averaged over the ranks; they have to be added up.": whole.norm() / world_size**0.5,
    }.items():
        expect(not _same(found, value), message)
    if not _same(found, whole.norm()):
        raise Wrong(f"You say {found:.6g}; it should be the root of the sum of all squares, on every rank.")


def sharded_step(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = 4 * world_size
    start = torch.linspace(-1, 1, size)
    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
    mean = torch.stack(gradients).mean(0)
    weights, sizes = start.clone(), []

    def update(some, gradient):
        sizes.append(some.numel())
        if some.shape != gradient.shape:
            raise Wrong(f"update got {some.numel()} weights and {gradient.numel()} gradients; cut both to the slice.")
        return some - 0.1 * gradient

    theirs(weights, gradients[rank].clone(), update)
    expect(len(sizes) == 1, f"update was called {len(sizes)} times; once, with this rank's slice, is asked for.")
    expect(
        sizes[0] != size,
        f"update was called with all {size} elements: it would keep state for all of them on every rank. That is DDP. "
        "Call it with this rank's slice.",
    )
    expect(sizes[0] * world_size == size, f"update got {sizes[0]} elements; a slice has {size // world_size}.")
    right = start - 0.1 * mean
    if _same(weights, right):
        return
    mine = slice(rank * size // world_size, (rank + 1) * size // world_size)
    for message, value in {
        "The weights have not changed: the gathered slices have to be written into `weights`.": start,
        f"The gradients are world_size ({world_size}) times too large: all_reduce sums.": start
        - 0.1 * world_size * mean,
    }.items():
        expect(not _same(weights, value), message)
    if _same(weights[mine], right[mine]):
        raise Wrong(
            "This rank's slice is right, the others' are not: the updated slices were not gathered, and the ranks "
            "compute with different weights from now on."
        )
    local = torch.cat([part.chunk(world_size)[r] for r, part in enumerate(gradients)])
    if _same(weights, start - 0.1 * local):
        raise Wrong("Each slice was updated by its rank's own gradient: the mean over the ranks is missing.")
    raise Wrong(f"The weights are up to {(weights - right).abs().max().item():.2g} away from DDP's.")
