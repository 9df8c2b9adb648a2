"""Lesson 3, Collectives: one way to solve the exercises."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def ring_bytes(elements: int, world_size: int) -> float:
    """Two passes of N − 1 steps, each with an Nth of the tensor."""
    return 2 * (world_size - 1) / world_size * 4 * elements


def reduction_seconds(parameters: int, world_size: int, gigabits_per_second: float) -> float:
    """Bytes over bytes per second; a byte has 8 bits."""
    return ring_bytes(parameters, world_size) / (gigabits_per_second * 1e9 / 8)


def broadcast(tensor: Tensor, root: int) -> None:
    """A chain that begins at the root."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    position = (rank - root) % world_size
    if position > 0:
        dist.recv(tensor, (rank - 1) % world_size)
    if position < world_size - 1:
        dist.send(tensor, (rank + 1) % world_size)


def _exchange(outgoing: Tensor, to: int, source: int) -> Tensor:
    """Send and receive at the same time: if all ranks first sent, all would wait."""
    request = dist.isend(outgoing.contiguous(), to)
    incoming = torch.empty_like(outgoing)
    dist.recv(incoming, source)
    request.wait()
    return incoming


def reduce_scatter(tensor: Tensor) -> Tensor:
    """A partial sum travels round the ring; every rank adds its part, and the last one keeps it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    chunks = tensor.chunk(world_size)
    partial = chunks[(rank - 1) % world_size]
    for step in range(world_size - 1):
        arrived = _exchange(partial, (rank + 1) % world_size, (rank - 1) % world_size)
        partial = arrived + chunks[(rank - 2 - step) % world_size]
    return partial


def all_gather(chunk: Tensor) -> Tensor:
    """Pass on what came last."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    chunks = [chunk] * world_size
    for step in range(world_size - 1):
        chunk = _exchange(chunk, (rank + 1) % world_size, (rank - 1) % world_size)
        chunks[(rank - 1 - step) % world_size] = chunk
    return torch.cat(chunks)


def all_reduce(tensor: Tensor) -> Tensor:
    """A reduce-scatter and an all-gather, of a length that divides."""
    padded = F.pad(tensor, (0, -len(tensor) % dist.get_world_size()))
    return all_gather(reduce_scatter(padded))[: len(tensor)]


def all_to_all(pieces: list[Tensor]) -> list[Tensor]:
    """In N − 1 turns, each with another pair of neighbours."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    received = list(pieces)
    for shift in range(1, world_size):
        to, source = (rank + shift) % world_size, (rank - shift) % world_size
        received[source] = _exchange(pieces[to], to, source)
    return received
