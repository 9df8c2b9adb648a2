"""Lesson 8, FSDP: one way to solve the exercises. by_hand.py has them together."""

import math

import torch
import torch.distributed as dist
from torch import Tensor


def rank_bytes(parameters: int, ranks: int, strategy: str, precision: str) -> float:
    """4 + 4 + 8 under FSDP; under ZeRO-3 twice the dtype's bytes, a master copy and two moments."""
    width = 2 if precision == "bf16" else 4
    per_parameter = 4 + 4 + 8 if strategy == "fsdp" else width + width + 4 + 8
    return per_parameter * parameters / ranks


def wire_bytes(blocks: int, root: int, ranks: int, accumulation: int, reshard: bool) -> float:
    """Gathers at every micro-batch, in 2 bytes; a reduction at the last one, in 4."""
    gathered = accumulation * 2 * ((2 if reshard else 1) * blocks + root)
    return (ranks - 1) / ranks * (gathered + 4 * (blocks + root))


def part_elements(rows: int, columns: int, ranks: int) -> dict[str, float]:
    """Whole rows, or any elements."""
    return {"fsdp": math.ceil(rows / ranks) * columns, "zero3": math.ceil(rows * columns / ranks)}


def my_rows(parameter: Tensor, rank: int, world_size: int) -> Tensor:
    """A slice of rows, which may be short or empty."""
    block = math.ceil(len(parameter) / world_size)
    return parameter[rank * block : (rank + 1) * block].clone()


def gather_block(mine: list[Tensor], rows: list[int]) -> list[Tensor]:
    """Pack, send, and sort the pieces by parameter."""
    message = torch.cat([part.flatten() for part in mine])
    messages = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    dist.all_gather(messages, message)
    pieces = [one.split([part.numel() for part in mine]) for one in messages]
    wholes = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    shaped = [whole.view(-1, *part.shape[1:]) for whole, part in zip(wholes, mine, strict=True)]
    return [whole[:count] for whole, count in zip(shaped, rows, strict=True)]


def reduce_rows(gradient: Tensor) -> Tensor:
    """Upcast first."""
    world_size = dist.get_world_size()
    parts = list(gradient.float().chunk(world_size))
    reduced = torch.empty_like(parts[0])
    dist.reduce_scatter(reduced, parts)
    return reduced / world_size
