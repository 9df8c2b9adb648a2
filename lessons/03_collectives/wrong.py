"""Wrong attempts at lesson 3, and what their message must say."""

import torch
import torch.distributed as dist

from lessons.checking import wrong_attempt


@wrong_attempt("ring_bytes", says="as much again")
def one_half(elements, world_size):
    return (world_size - 1) / world_size * 4 * elements


@wrong_attempt("ring_bytes", says="to every other rank")
def to_everybody(elements, world_size):
    return (world_size - 1) * 4 * elements


@wrong_attempt("ring_bytes", says="a float32 has 4 bytes")
def elements_for_bytes(elements, world_size):
    return 2 * (world_size - 1) / world_size * elements


@wrong_attempt("reduction_seconds", says="gigabits for gigabytes")
def bits_for_bytes(parameters, world_size, gigabits_per_second):
    return 2 * (world_size - 1) / world_size * 4 * parameters / (gigabits_per_second * 1e9)


@wrong_attempt("reduction_seconds", says="once through the link")
def once(parameters, world_size, gigabits_per_second):
    return 4 * parameters / (gigabits_per_second * 1e9 / 8)


@wrong_attempt("broadcast", says="the root serves everybody")
def star(tensor, root):
    if dist.get_rank() == root:
        for rank in range(dist.get_world_size()):
            if rank != root:
                dist.send(tensor, rank)
    else:
        dist.recv(tensor, root)


@wrong_attempt("broadcast", says="Is `root` used")
def always_rank_0(tensor, root):
    rank = dist.get_rank()
    if rank > 0:
        dist.recv(tensor, rank - 1)
    if rank < dist.get_world_size() - 1:
        dist.send(tensor, rank + 1)


@wrong_attempt("broadcast", says="waits in recv")
def everybody_receives(tensor, root):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.recv(tensor, (rank - 1) % world_size)
    dist.send(tensor, (rank + 1) % world_size)


def _exchange(outgoing, to, source):
    request = dist.isend(outgoing.contiguous(), to)
    incoming = torch.empty_like(outgoing)
    dist.recv(incoming, source)
    request.wait()
    return incoming


def _neighbours():
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return rank, world_size, (rank + 1) % world_size, (rank - 1) % world_size


@wrong_attempt("reduce_scatter", says="waits in send")
def send_first(tensor):
    rank, world_size, right, left = _neighbours()
    partial = tensor.chunk(world_size)[left].clone()
    arrived = torch.empty_like(partial)
    dist.send(partial, right)
    dist.recv(arrived, left)
    return arrived


@wrong_attempt("reduce_scatter", says="should end with chunk")
def starts_at_itself(tensor):
    rank, world_size, right, left = _neighbours()
    chunks = tensor.chunk(world_size)
    partial = chunks[rank]
    for step in range(world_size - 1):
        partial = _exchange(partial, right, left) + chunks[(rank - 1 - step) % world_size]
    return partial


@wrong_attempt("reduce_scatter", says="sends 96 bytes")
def everything_to_everybody(tensor):
    rank, world_size, right, left = _neighbours()
    total = tensor.clone()
    for shift in range(1, world_size):
        total += _exchange(tensor, (rank + shift) % world_size, (rank - shift) % world_size)
    return total.chunk(world_size)[rank]


@wrong_attempt("all_gather", says="not in the order")
def order_of_arrival(chunk):
    rank, world_size, right, left = _neighbours()
    chunks = [chunk]
    for _ in range(world_size - 1):
        chunks.append(_exchange(chunks[-1], right, left))
    return torch.cat(chunks)


@wrong_attempt("all_gather", says="You called all_gather")
def the_real_one(chunk):
    chunks = [torch.empty_like(chunk) for _ in range(dist.get_world_size())]
    dist.all_gather(chunks, chunk)
    return torch.cat(chunks)


@wrong_attempt("all_reduce", says="do not divide")
def drops_the_rest(tensor):
    rank, world_size, right, left = _neighbours()
    n = len(tensor) // world_size * world_size
    return _summed(tensor[:n])


@wrong_attempt("all_reduce", says="times as much")
def all_to_everybody(tensor):
    rank, world_size, right, left = _neighbours()
    total, passing = tensor.clone(), tensor
    for _ in range(world_size - 1):
        passing = _exchange(passing, right, left)
        total += passing
    return total


@wrong_attempt("all_reduce", says="That is the mean")
def averaged(tensor):
    return _summed(tensor) / dist.get_world_size()


def _summed(tensor):
    """Right, but no ring."""
    total, passing = tensor.clone(), tensor
    rank, world_size, right, left = _neighbours()
    for _ in range(world_size - 1):
        passing = _exchange(passing, right, left)
        total += passing
    return total


@wrong_attempt("all_to_all", says="nothing was received")
def own_pieces(pieces):
    return list(pieces)


@wrong_attempt("all_to_all", says="it should be what rank")
def always_first(pieces):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    received = list(pieces)
    for shift in range(1, world_size):
        to, source = (rank + shift) % world_size, (rank - shift) % world_size
        received[source] = _exchange(pieces[0], to, source)
    return received
