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


@wrong_attempt("ring_bytes", says="every chunk but one")
def twice_the_tensor(elements, world_size):
    return 2 * 4 * elements


@wrong_attempt("ring_bytes", says="all ranks together")
def all_ranks(elements, world_size):
    return 2 * (world_size - 1) * 4 * elements


@wrong_attempt("ring_bytes", says="bits in place of bytes")
def bits(elements, world_size):
    return 2 * (world_size - 1) / world_size * 32 * elements


def _seconds(parameters, world_size, gigabits_per_second):
    return 2 * (world_size - 1) / world_size * 4 * parameters / (gigabits_per_second * 1e9 / 8)


@wrong_attempt("reduction_seconds", says="2³⁰ bits for a gigabit")
def binary_gigabits(parameters, world_size, gigabits_per_second):
    return _seconds(parameters, world_size, gigabits_per_second) * 1e9 / 2**30


@wrong_attempt("reduction_seconds", says="without the all-gather")
def half_the_way(parameters, world_size, gigabits_per_second):
    return _seconds(parameters, world_size, gigabits_per_second) / 2


@wrong_attempt("reduction_seconds", says="in milliseconds")
def milliseconds(parameters, world_size, gigabits_per_second):
    return _seconds(parameters, world_size, gigabits_per_second) * 1e3


@wrong_attempt("broadcast", says="never wait for what irecv has started")
def received_some_day(tensor, root):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    position = (rank - root) % world_size
    if position > 0:
        dist.irecv(tensor, (rank - 1) % world_size)
    if position < world_size - 1:
        dist.send(tensor, (rank + 1) % world_size)


@wrong_attempt("broadcast", says="You called broadcast")
def the_library(tensor, root):
    dist.broadcast(tensor, root)


@wrong_attempt("broadcast", says="returns nothing")
def returned(tensor, root):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    position = (rank - root) % world_size
    if position > 0:
        dist.recv(tensor, (rank - 1) % world_size)
    if position < world_size - 1:
        dist.send(tensor, (rank + 1) % world_size)
    return tensor


@wrong_attempt("broadcast", says="nothing arrived in it")
def into_another(tensor, root):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    position, arrived = (rank - root) % world_size, tensor.clone()
    if position > 0:
        dist.recv(arrived, (rank - 1) % world_size)
    if position < world_size - 1:
        dist.send(arrived, (rank + 1) % world_size)


def _ring_sum(tensor):
    rank, world_size, right, left = _neighbours()
    chunks = tensor.chunk(world_size)
    partial = chunks[left]
    for step in range(world_size - 1):
        partial = _exchange(partial, right, left) + chunks[(rank - 2 - step) % world_size]
    return partial


@wrong_attempt("reduce_scatter", says="That is the mean")
def mean_of_a_chunk(tensor):
    return _ring_sum(tensor) / dist.get_world_size()


@wrong_attempt("reduce_scatter", says="never wait for what irecv has started")
def never_waited_for(tensor):
    rank, world_size, right, left = _neighbours()
    chunks = tensor.chunk(world_size)
    partial = chunks[left]
    for step in range(world_size - 1):
        arrived = torch.empty_like(partial)
        dist.irecv(arrived, left)
        dist.send(partial, right)
        partial = arrived + chunks[(rank - 2 - step) % world_size]
    return partial


@wrong_attempt("reduce_scatter", says="Your function has changed `tensor`")
def into_the_argument(tensor):
    rank, world_size, right, left = _neighbours()
    chunks = tensor.chunk(world_size)
    for step in range(world_size - 1):
        arrived = _exchange(chunks[(rank - 1 - step) % world_size], right, left)
        chunks[(rank - 2 - step) % world_size].add_(arrived)
    return chunks[rank].clone()


@wrong_attempt("reduce_scatter", says="are not added")
def own_chunk(tensor):
    return tensor.chunk(dist.get_world_size())[dist.get_rank()].clone()


@wrong_attempt("all_gather", says="chunk 3 times")
def own_chunk_repeated(chunk):
    return chunk.repeat(dist.get_world_size())


@wrong_attempt("all_gather", says="it should be (12,)")
def stacked(chunk):
    rank, world_size, right, left = _neighbours()
    chunks = [chunk] * world_size
    for step in range(world_size - 1):
        chunk = _exchange(chunk, right, left)
        chunks[(rank - 1 - step) % world_size] = chunk
    return torch.stack(chunks)


@wrong_attempt("all_gather", says="this rank sends")
def by_way_of_rank_0(chunk):
    rank, world_size, _, _ = _neighbours()
    whole = torch.cat([chunk] * world_size)
    if rank:
        dist.send(chunk, 0)
        dist.recv(whole, 0)
        return whole
    for other in range(1, world_size):
        dist.recv(whole[other * len(chunk) : (other + 1) * len(chunk)], other)
    for other in range(1, world_size):
        dist.send(whole, other)
    return whole


@wrong_attempt("all_gather", says="receive into a tensor of float32")
def always_float32(chunk):
    rank, world_size, right, left = _neighbours()
    chunks = [chunk] * world_size
    for step in range(world_size - 1):
        request = dist.isend(chunk, right)
        arrived = torch.empty(len(chunk))
        dist.recv(arrived, left)
        request.wait()
        chunks[(rank - 1 - step) % world_size] = chunk = arrived
    return torch.cat(chunks)


@wrong_attempt("all_reduce", says="You called all_reduce")
def torchs_own(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total


@wrong_attempt("all_reduce", says="Your function has changed `tensor`")
def summed_in_place(tensor):
    return tensor.copy_(_summed(tensor))


@wrong_attempt("all_reduce", says="cut them off again")
def zeros_left_on(tensor):
    rank, world_size, right, left = _neighbours()
    padded = torch.cat([tensor, tensor.new_zeros(-len(tensor) % world_size)])
    return _summed(padded)


@wrong_attempt("all_to_all", says="You called all_to_all")
def the_real_all_to_all(pieces):
    received = [torch.empty_like(piece) for piece in pieces]
    dist.all_to_all_single(torch.cat(received), torch.cat(pieces))
    return received


@wrong_attempt("all_to_all", says="times as much")
def everything_passed_round(pieces):
    rank, world_size, right, left = _neighbours()
    passing, received = torch.stack(pieces), list(pieces)
    for step in range(world_size - 1):
        passing = _exchange(passing, right, left)
        received[(rank - 1 - step) % world_size] = passing[rank]
    return received


@wrong_attempt("all_to_all", says="it should be what rank")
def in_order_of_arrival(pieces):
    rank, world_size, _, _ = _neighbours()
    received = [pieces[rank]]
    for shift in range(1, world_size):
        to, source = (rank + shift) % world_size, (rank - shift) % world_size
        received.append(_exchange(pieces[to], to, source))
    return received


@wrong_attempt("all_to_all", says="never wait for what isend has started")
def sent_some_day(pieces):
    rank, world_size, _, _ = _neighbours()
    received = list(pieces)
    for shift in range(1, world_size):
        to, source = (rank + shift) % world_size, (rank - shift) % world_size
        dist.isend(pieces[to], to)
        received[source] = torch.empty_like(pieces[to])
        dist.recv(received[source], source)
    return received


@wrong_attempt("broadcast", says="the last rank need not pass it on")
def round_the_whole_ring(tensor, root):
    rank, world_size, right, left = _neighbours()
    if rank == root:
        dist.send(tensor, right)
        dist.recv(tensor.clone(), left)
    else:
        dist.recv(tensor, left)
        dist.send(tensor, right)


@wrong_attempt("all_gather", says="Right on 3 ranks, but on 2")
def three_chunks(chunk):
    rank, world_size, right, left = _neighbours()
    chunks = [chunk] * 3
    for step in range(world_size - 1):
        chunk = _exchange(chunk, right, left)
        chunks[(rank - 1 - step) % world_size] = chunk
    return torch.cat(chunks)
