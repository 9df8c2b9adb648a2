"""Lesson 6, ZeRO-2: one way to solve the exercises. by_hand.py has them together."""

import torch.distributed as dist
from torch import Tensor


def rank_bytes(parameters: int, ranks: int) -> float:
    """2 whole, 2 + 4 + 4 + 4 shared out."""
    return 2 * parameters + 14 * parameters / ranks


def wire_bytes(parameters: int, ranks: int, accumulation: int, to_owners: bool) -> float:
    """One pass of the ring to reduce or two to all-reduce, per micro-batch; then one to gather."""
    once = (ranks - 1) / ranks * 2 * parameters
    return accumulation * (1 if to_owners else 2) * once + once


def most_gradients(numels: list[int], mine: list[int], bucket: int) -> int:
    """Waiting and kept, after each arrival."""
    most = kept = waiting = waiting_mine = 0
    for numel, own in zip(numels, mine, strict=True):
        most = max(most, kept + waiting + numel)
        if waiting + numel > bucket:
            kept += waiting_mine
            waiting = waiting_mine = 0
        waiting += numel
        waiting_mine += own
    return most


def owners(offset: int, numel: int, part: int) -> list[tuple[int, int, int]]:
    """From the owner of the first element to that of the last one; of no elements nobody."""
    ranks = range(offset // part, (offset + numel - 1) // part + 1) if numel else []
    return [(r, max(r * part - offset, 0), min((r + 1) * part - offset, numel)) for r in ranks]


def to_owners(gradients: list[Tensor | None], owner: list[int]) -> None:
    """Every rank takes part in every reduction."""
    for i, (gradient, rank) in enumerate(zip(gradients, owner, strict=True)):
        dist.reduce(gradient, rank)
        if rank == dist.get_rank():
            gradient /= dist.get_world_size()
        else:
            gradients[i] = None
