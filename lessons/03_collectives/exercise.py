"""Lesson 3, Collectives. Write the functions with nothing but dist.send, dist.recv, dist.isend and dist.irecv.

`shardrun lesson check 3` starts three ranks for you. Every rank calls your function; dist.get_rank() says which it is.
"""

import torch  # noqa: F401
import torch.distributed as dist  # noqa: F401
from torch import Tensor


def ring_bytes(elements: int, world_size: int) -> float:
    """Bytes that one rank sends in a ring all-reduce of so many float32 elements."""
    raise NotImplementedError


def reduction_seconds(parameters: int, world_size: int, gigabits_per_second: float) -> float:
    """Seconds to all-reduce the float32 gradients of so many parameters on a ring.

    gigabits_per_second: what a rank's link carries each way (1 Gb = 10⁹ bits). Leave the latency out.
    """
    raise NotImplementedError


def broadcast(tensor: Tensor, root: int) -> None:
    """Make `tensor`, of any shape and dtype, on every rank what it is on rank `root`, in place.

    No rank sends it more than once.
    """
    raise NotImplementedError


def reduce_scatter(tensor: Tensor) -> Tensor:
    """The sum over all ranks of chunk number `rank` of their tensors.

    tensor: float32 [world_size * n], another one on every rank; returns float32 [n].
    A rank sends (N − 1)/N of its tensor's bytes.
    """
    raise NotImplementedError


def all_gather(chunk: Tensor) -> Tensor:
    """The chunks of all ranks, in the order of the ranks: [n] → [world_size * n], of any dtype.

    A rank sends N − 1 chunks.
    """
    raise NotImplementedError


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all ranks of their tensors, on every rank. tensor: float32 [any length from 1 on].

    A rank sends 2 · (N − 1)/N of its tensor's bytes, not counting what makes the length divide.
    """
    raise NotImplementedError


def all_to_all(pieces: list[Tensor]) -> list[Tensor]:
    """Give pieces[r] to rank r; returns what every rank had for this one, by rank.

    All pieces have one shape and one dtype, whichever. A rank sends N − 1 of them.
    """
    raise NotImplementedError
