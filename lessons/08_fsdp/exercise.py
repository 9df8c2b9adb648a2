"""Lesson 8, FSDP. Write the six functions; `shardrun lesson check 8` starts the ranks for you."""

import torch  # noqa: F401
import torch.distributed as dist  # noqa: F401
from torch import Tensor


def rank_bytes(parameters: int, ranks: int, strategy: str, precision: str) -> float:
    """Bytes of model states on a rank, with AdamW, before the update and without padding.

    strategy: "fsdp" (torch, as Shardrun runs it) or "zero3" (DeepSpeed); precision: "fp32" or "bf16", what is computed
    in. In the demo's tables you can look up both.
    """
    raise NotImplementedError


def wire_bytes(blocks: int, root: int, ranks: int, accumulation: int, reshard: bool) -> float:
    """Bytes that one rank puts on the wire of a ring in one optimizer step of FSDP, in bf16.

    blocks, root: parameters in the blocks, and in no block; accumulation: micro-batches of a step; reshard: a block's
    parameters are let go after its forward pass (the root's never are). Parameters are gathered in bf16; gradients are
    reduce-scattered in float32, at the last micro-batch.
    """
    raise NotImplementedError


def part_elements(rows: int, columns: int, ranks: int) -> dict[str, float]:
    """Elements of a rank's part of a matrix with its padding: {"fsdp": …, "zero3": …}.

    FSDP cuts by rows into blocks of equal size, ZeRO-3 the flattened matrix into equal parts.
    """
    raise NotImplementedError


def my_rows(parameter: Tensor, rank: int, world_size: int) -> Tensor:
    """The rows (of dimension 0) that a rank keeps of a parameter [rows, ...], without padding, as a new tensor.

    Blocks of ceil(rows / world_size) rows, in order; the last ranks may have fewer, or none.
    """
    raise NotImplementedError


def gather_block(mine: list[Tensor], rows: list[int]) -> list[Tensor]:
    """All parameters of a block, whole, with one all-gather in all.

    mine: this rank's rows of each parameter, float32 [ceil(rows / world_size), ...], filled up with zeros where there
    are none left; rows: how many rows the whole parameters have. Returns them, [rows, ...].
    """
    raise NotImplementedError


def reduce_rows(gradient: Tensor) -> Tensor:
    """This rank's rows of the mean gradient over all ranks, in float32, as a tensor of their own.

    gradient: this rank's own, whole, bfloat16 [rows, columns]; rows divide by the world size. Rank r has block r.
    """
    raise NotImplementedError
