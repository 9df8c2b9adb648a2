"""Lesson 5, ZeRO-1: one way to solve the exercises. by_hand.py has them together."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def rank_bytes(parameters: int, ranks: int) -> float:
    """2 + 2 whole, 4 + 4 + 4 shared out."""
    return (2 + 2) * parameters + 12 * parameters / ranks


def wire_bytes(parameters: int, ranks: int, reduce_scatter: bool) -> float:
    """One pass of the ring to reduce-scatter or two to all-reduce, and one to gather."""
    passes = 2 if reduce_scatter else 3
    return passes * (ranks - 1) / ranks * 2 * parameters


def pieces(numels: list[int], rank: int, world_size: int) -> list[tuple[int, int, int]]:
    """The intersection of two intervals, for every parameter."""
    part = math.ceil(sum(numels) / (2 * world_size)) * 2
    found, offset = [], 0
    for i, numel in enumerate(numels):
        start, stop = max(rank * part - offset, 0), min((rank + 1) * part - offset, numel)
        if start < stop:
            found.append((i, start, stop))
        offset += numel
    return found


def clip_norm(mine: Tensor) -> float:
    """Squares add up."""
    square = mine.square().sum()
    dist.all_reduce(square)
    return square.sqrt().item()


def sharded_step(
    weights: Tensor,
    gradient: Tensor,
    update: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Reduce everything, update a slice, gather everything."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mean = gradient.clone()
    dist.all_reduce(mean)
    mean /= world_size
    new = update(weights.chunk(world_size)[rank], mean.chunk(world_size)[rank])
    gathered = torch.empty_like(weights)
    dist.all_gather(list(gathered.chunk(world_size)), new.contiguous())
    weights.copy_(gathered)
