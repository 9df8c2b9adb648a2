"""Lesson 4, DDP. Write the six functions; `shardrun lesson check 4` starts the ranks for you."""

import torch
import torch.distributed as dist  # noqa: F401
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def micro_batches(global_rows: int, rows_per_forward: int, ranks: int) -> int:
    """Micro-batches per optimizer step on each rank, so that a step sees `global_rows` rows in all.

    rows_per_forward: rows of one forward pass on one rank. Raises ValueError where it does not divide.
    """
    raise NotImplementedError


def wire_bytes(parameters: int, ranks: int, accumulation: int, no_sync: bool) -> float:
    """Bytes that one rank puts on the wire of a ring in one optimizer step of DDP, gradients in float32.

    no_sync: whether gradients are reduced at the last of `accumulation` micro-batches only, or at each.
    """
    raise NotImplementedError


def my_rows(batch: Tensor, rank: int, world_size: int) -> Tensor:
    """This rank's part of a global batch [rows, length]; rows divides by world_size."""
    raise NotImplementedError


def average_gradients(model: nn.Module) -> None:
    """After backward() on every rank's own rows: replace every gradient by the mean over all ranks, in place."""
    raise NotImplementedError


def make_buckets(parameters: list[torch.nn.Parameter], bucket_bytes: int) -> list[list[torch.nn.Parameter]]:
    """Share out parameters (in the model's order) into buckets of at most bucket_bytes bytes of gradients.

    In the order in which backward makes their gradients, assumed to be the reverse of the model's order; each bucket
    as full as that order allows. A gradient larger than bucket_bytes gets a bucket of its own.
    """
    raise NotImplementedError


def accumulate(model: DistributedDataParallel, batches: list[Tensor]) -> None:
    """Leave in .grad the gradient of the mean loss over all micro-batches and ranks, with as little traffic as can be.

    model(batch) returns the mean loss of a micro-batch. Gradients are cleared when this is called.
    """
    raise NotImplementedError
