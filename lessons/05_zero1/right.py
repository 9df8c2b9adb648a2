"""Other right solutions of lesson 5."""

import torch
import torch.distributed as dist

from lessons.checking import right_attempt


@right_attempt("pieces")
def element_by_element(numels, rank, world_size):
    total = sum(numels)
    padded = total + -total % (2 * world_size)
    first, end = rank * padded // world_size, (rank + 1) * padded // world_size
    found, at = {}, 0
    for i, numel in enumerate(numels):
        for element in range(numel):
            if first <= at < end:
                found[i] = (i, found.get(i, (i, element))[1], element + 1)
            at += 1
    return list(found.values())


@right_attempt("clip_norm")
def squares_of_all_ranks(mine):
    square = (mine.double() @ mine.double()).view(1)
    squares = [torch.empty_like(square) for _ in range(dist.get_world_size())]
    dist.all_gather(squares, square)
    return float(sum(squares)) ** 0.5


@right_attempt("sharded_step")
def scattered_and_broadcast(weights, gradient, update):
    """As in the paper: 1Ψ to reduce, then every owner hands out its slice, in the same memory."""
    world_size = dist.get_world_size()
    mine = torch.empty(len(weights) // world_size)
    dist.reduce_scatter(mine, list((gradient / world_size).chunk(world_size)))
    slices = weights.chunk(world_size)
    slices[dist.get_rank()][:] = update(slices[dist.get_rank()], mine)
    for rank, part in enumerate(slices):
        dist.broadcast(part, rank)
