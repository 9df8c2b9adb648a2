"""Lesson 7, ZeRO-3: one way to solve the exercises. by_hand.py has them together."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad


def rank_bytes(parameters: int, ranks: int) -> float:
    """2 + 2 + 4 + 4 + 4, all shared out."""
    return 16 * parameters / ranks


def wire_bytes(parameters: int, ranks: int, accumulation: int, keep: bool) -> float:
    """One or two gathers and a reduce-scatter, each one pass of the ring, at every micro-batch."""
    return accumulation * (2 if keep else 3) * (ranks - 1) / ranks * 2 * parameters


def most_gathered(numels: list[int], ahead: int) -> int:
    """The heaviest window."""
    return max(sum(numels[i : i + ahead + 1]) for i in range(len(numels)))


def cut(parameter: Tensor, rank: int, world_size: int) -> Tensor:
    """Flatten, pad, slice."""
    part = math.ceil(parameter.numel() / world_size)
    flat = pad(parameter.flatten(), (0, part * world_size - parameter.numel()))
    return flat[rank * part : (rank + 1) * part].clone()


def whole(mine: Tensor, shape: tuple[int, ...]) -> Tensor:
    """All parts end to end, without the padding."""
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[: math.prod(shape)].view(shape)


def linear_backward(
    x: Tensor,
    upstream: Tensor,
    mine: Tensor,
    shape: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Gather for the input's gradient; reduce-scatter the weight's."""
    world_size = dist.get_world_size()
    weight = whole(mine, shape)
    gradient = upstream.T @ x
    padded = pad(gradient.flatten(), (0, world_size * mine.numel() - gradient.numel()))
    part = torch.empty_like(mine)
    dist.reduce_scatter(part, list(padded.chunk(world_size)))
    return upstream @ weight, part / world_size
