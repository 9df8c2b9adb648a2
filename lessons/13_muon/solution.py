"""Lesson 13, Muon: one way to solve the exercises."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def orthogonal(gradient: Tensor) -> Tensor:
    """torch.linalg.svd gives Vᵀ already."""
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    return u @ vh


def newton_schulz(gradient: Tensor, steps: int) -> Tensor:
    """On the wide form, where A is the smaller of the two products."""
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if tall else gradient
    x = x / x.norm()
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def uses_muon(name: str, shape: tuple[int, ...]) -> bool:
    """By name and by shape: in a block, and a matrix."""
    return name.startswith("blocks.") and len(shape) == 2


def muon_step(
    weight: Tensor,
    gradient: Tensor,
    buffer: Tensor,
    lr: float,
    momentum: float,
    orthogonalize: Callable[[Tensor], Tensor],
) -> None:
    """Momentum first, then orthogonalise: the sum is what counts."""
    buffer.lerp_(gradient, 1 - momentum)
    update = orthogonalize(gradient.lerp(buffer, momentum))
    rows, columns = weight.shape
    weight.sub_(lr * max(1, rows / columns) ** 0.5 * update)


def state_bytes(block_matrices: int, others: int) -> dict[str, int]:
    """Muon keeps a momentum, AdamW two moments."""
    return {"adamw": 8 * (block_matrices + others), "muon": 4 * block_matrices + 8 * others}


def exchange_bytes(elements: int, world_size: int) -> dict[str, int]:
    """An all-gather passes on the shards of all others; an all-to-all sends each part of a shard once, in and out."""
    shard = 4 * elements // world_size
    return {
        "all_gather": shard * (world_size - 1),
        "all_to_all": 2 * shard * (world_size - 1) // world_size,
    }


def sharded_update(shard: Tensor, orthogonalize: Callable[[Tensor], Tensor]) -> Tensor:
    """Gather the rows of all ranks, orthogonalise, keep one's own."""
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard.contiguous())
    return orthogonalize(torch.cat(shards)).chunk(len(shards))[dist.get_rank()]
