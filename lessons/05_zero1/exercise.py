"""Lesson 5, ZeRO-1. Write the five functions; `shardrun lesson check 5` starts the ranks for you."""

from collections.abc import Callable

import torch  # noqa: F401
import torch.distributed as dist  # noqa: F401
from torch import Tensor


def rank_bytes(parameters: int, ranks: int) -> float:
    """Bytes of model states on a rank under ZeRO-1 with AdamW, as the ZeRO paper counts them.

    bf16 parameters and gradients; float32 master weights and two float32 moments. Without padding.
    """
    raise NotImplementedError


def wire_bytes(parameters: int, ranks: int, reduce_scatter: bool) -> float:
    """Bytes that one rank puts on the wire of a ring in one step of ZeRO-1; gradients and parameters in bf16.

    reduce_scatter: gradients are reduce-scattered, as in the paper; else all-reduced, as DeepSpeed does by default.
    """
    raise NotImplementedError


def pieces(numels: list[int], rank: int, world_size: int) -> list[tuple[int, int, int]]:
    """What of each parameter falls into this rank's slice of a flat buffer.

    numels: elements of the parameters, which lie end to end in the buffer; it is padded to a multiple of
    2 · world_size and cut into equal slices. Returns (index, start, stop) for each parameter of which this rank has
    anything: elements [start, stop) of that parameter. In order; padding is no piece.
    """
    raise NotImplementedError


def clip_norm(mine: Tensor) -> float:
    """The L2 norm of the whole gradient; mine: this rank's slice of it, float32 [n]. The same on every rank."""
    raise NotImplementedError


def sharded_step(weights: Tensor, gradient: Tensor, update: Callable[[Tensor, Tensor], Tensor]) -> None:
    """One step of ZeRO-1, in place.

    weights: the whole flat buffer, float32 [n], equal on all ranks, n divisible by the world size; gradient: this
    rank's own, of its own rows, float32 [n]; update(weights, mean gradient) → new weights of the same shape: the
    optimizer, which keeps state for every element that it is called with.
    """
    raise NotImplementedError
