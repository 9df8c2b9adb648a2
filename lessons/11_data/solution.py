"""Lesson 11, The data pipeline: one way to solve the exercises."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def batch_bytes(rows: int, length: int) -> dict[str, int]:
    """One token more than the row is long; two int64 tensors."""
    return {"disk": 2 * rows * (length + 1), "memory": 2 * 8 * rows * length}


def step_ms(data: float, copy: float, compute: float, prefetch: bool, pinned: bool) -> float:
    """What runs side by side takes as long as its slowest part."""
    if prefetch and pinned:
        return max(data, copy, compute)
    return max(data, copy + compute) if prefetch else data + copy + compute


def read_tokens(path: Path, first: int, last: int) -> np.ndarray:
    """The header says what it is; the map begins behind it."""
    magic = np.fromfile(path, dtype="<i4", count=1)
    if magic[0] != 20240520:
        raise ValueError(f"{path} begins with {magic[0]}: it is no shard")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)[first:last]


def cut_rows(stream: Tensor, length: int, start: int) -> tuple[Tensor, Tensor]:
    """unfold gives overlapping views; stack copies them."""
    count = (len(stream) - 1) // length
    rows = torch.stack([stream[r * length : (r + 1) * length + 1] for r in range(count)])
    rows[:, 0] = start
    return rows[:, :-1], rows[:, 1:]


def document_mask(tokens: Tensor, start: int) -> Tensor:
    """Number the documents; same number, and not later."""
    document = (tokens == start).cumsum(-1)
    return (document[:, None] == document[None, :]).tril()


def batch_rows(
    step: int,
    rank: int,
    world_size: int,
    global_batch: int,
    rows_per_epoch: int,
    shuffled: Callable[[int], list[int]],
) -> list[int]:
    """Positions of an endless order, each found by division."""
    mine = global_batch // world_size
    first = step * global_batch + rank * mine
    found = []
    for position in range(first, first + mine):
        epoch, place = divmod(position, rows_per_epoch)
        found.append(shuffled(epoch)[place])
    return found
