"""Lesson 4, DDP: one way to solve the exercises. by_hand.py has them together, with overlap."""

from contextlib import nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def micro_batches(global_rows: int, rows_per_forward: int, ranks: int) -> int:
    """global = local · ranks · accumulation."""
    together = rows_per_forward * ranks
    if global_rows % together:
        raise ValueError(f"{global_rows} rows do not divide by {ranks} · {rows_per_forward}.")
    return global_rows // together


def wire_bytes(parameters: int, ranks: int, accumulation: int, no_sync: bool) -> float:
    """A ring all-reduce of 4 bytes per parameter, once or after every micro-batch."""
    once = 2 * (ranks - 1) / ranks * 4 * parameters
    return once if no_sync else accumulation * once


def my_rows(batch: Tensor, rank: int, world_size: int) -> Tensor:
    """A block of rows."""
    rows = len(batch) // world_size
    return batch[rank * rows : (rank + 1) * rows]


def average_gradients(model: nn.Module) -> None:
    """Sum, then divide."""
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def make_buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Fill them from the last parameter on."""
    buckets: list[list[nn.Parameter]] = []
    held = 0
    for p in reversed(parameters):
        size = p.numel() * p.element_size()
        if not buckets or held + size > bucket_bytes:
            buckets.append([])
            held = 0
        buckets[-1].append(p)
        held += size
    return buckets


def accumulate(model: DistributedDataParallel, batches: list[Tensor]) -> None:
    """All but the last without communication."""
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else model.no_sync():
            (model(batch) / len(batches)).backward()
