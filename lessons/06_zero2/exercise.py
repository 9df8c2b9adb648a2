"""Lesson 6, ZeRO-2. Write the five functions; `shardrun lesson check 6` starts the ranks for you."""

import torch  # noqa: F401
import torch.distributed as dist  # noqa: F401
from torch import Tensor


def rank_bytes(parameters: int, ranks: int) -> float:
    """Bytes of model states on a rank under ZeRO-2 with AdamW, as the ZeRO paper counts them.

    bf16 parameters and gradients; float32 master weights and two float32 moments. Without padding.
    """
    raise NotImplementedError


def wire_bytes(parameters: int, ranks: int, accumulation: int, to_owners: bool) -> float:
    """Bytes that one rank puts on the wire of a ring in one optimizer step of ZeRO-2; all of it in bf16.

    accumulation: micro-batches of a step; to_owners: gradients are reduced to their owners, as in the paper ((N − 1)/N
    of them are sent, as in a reduce-scatter); else all-reduced, as DeepSpeed does by default.
    """
    raise NotImplementedError


def most_gradients(numels: list[int], mine: list[int], bucket: int) -> int:
    """Elements of gradients that are alive on this rank at most, while one backward pass runs.

    numels: elements of the gradients in the order in which backward makes them; mine: how many of each this rank owns
    and keeps; bucket: when a gradient has come and does not fit into the bucket (of so many elements) with those that
    wait there, those are reduced first: of them only this rank's elements stay. One larger than the bucket goes in
    alone. At the end the last ones are reduced too.
    """
    raise NotImplementedError


def owners(offset: int, numel: int, part: int) -> list[tuple[int, int, int]]:
    """Who needs which elements of a parameter's gradient.

    The parameter lies at [offset, offset + numel) of a flat buffer, of which rank r owns [r · part, (r + 1) · part).
    Returns (rank, start, stop) for each rank that owns any: elements [start, stop) of the parameter. In order.
    """
    raise NotImplementedError


def to_owners(gradients: list[Tensor | None], owner: list[int]) -> None:
    """Leave in `gradients`, in place, the mean over all ranks where this rank is the owner, and None elsewhere.

    gradients: this rank's own, float32, of the same shapes on every rank; owner: for each, the rank that needs it.
    """
    raise NotImplementedError
