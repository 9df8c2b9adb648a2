"""Checks of lesson 3. Those of the collectives run on every rank; what is sent is counted by the wire meter."""

import torch
import torch.distributed as dist

from lessons.cases import formula, generated, st
from lessons.checking import Wrong, expect, expect_number, expect_own, expect_tensor
from lessons.meters import Requests, sent_bytes
from lessons.worlds import of_all, on_two_ranks
from strategies.ledger.wire import Meter

LENGTH = 4


def ring_bytes(theirs):
    for elements, world_size in ((7 * 10**9, 6), (7 * 10**9, 8), (1000, 4), (1000, 2), (1000, 1)):
        whole = 4 * elements
        share = (world_size - 1) / world_size
        expect_number(
            theirs(elements, world_size),
            2 * share * whole,
            f"{elements:,} elements on {world_size} ranks, in bytes",
            {
                "On one rank nothing is sent.": 2 * whole if world_size == 1 else -1,
                "That is half of it: the reduce-scatter. The all-gather sends as much again.": share * whole,
                "That is twice the tensor. In each half a rank sends every chunk but one: (N − 1)/N of it.": 2 * whole,
                "That is the tensor once: the payload. A ring sends 2 · (N − 1)/N of it.": whole,
                "That has N/(N − 1) in the place of (N − 1)/N.": 2 * whole / share if share else -1,
                "That sends the whole tensor to every other rank; a ring passes on sums, an Nth at a time.": (
                    (world_size - 1) * whole
                ),
                "That is all ranks together; one rank's wire is asked for.": 2 * (world_size - 1) * whole,
                "That counts elements; a float32 has 4 bytes.": 2 * share * elements,
            },
            world_size,
        )
    formula(
        theirs, lambda elements, ranks: 8 * elements - 8 * elements / ranks, "in bytes", "world_size",
        elements=st.integers(0, 10**10), world_size=st.integers(1, 64),
    )  # fmt: skip


def reduction_seconds(theirs):
    for parameters, world_size, gigabits in ((7 * 10**9, 6, 400.0), (7 * 10**9, 8, 100.0), (1000, 1, 100.0)):
        right = 2 * (world_size - 1) / world_size * 4 * parameters / (gigabits / 8 * 1e9)
        expect_number(
            theirs(parameters, world_size, gigabits),
            right,
            f"{parameters:,} parameters, {world_size} ranks and {gigabits:g} Gb/s, in seconds",
            {
                "That takes gigabits for gigabytes: a byte has 8 bits.": right / 8,
                "That is eight times too long: a byte's 8 bits counted twice?": right * 8,
                "That takes 2³⁰ bits for a gigabit; a link's Gb is 10⁹ bits.": right * 1e9 / 2**30,
                "That is the tensor once through the link; a ring sends 2 (N − 1)/N of it.": (
                    4 * parameters / (gigabits / 8 * 1e9)
                ),
                "That is half of it: the reduce-scatter without the all-gather.": right / 2,
                "That is in milliseconds.": right * 1e3,
            },
            world_size,
        )
    formula(
        theirs, lambda parameters, ranks, gigabits: 64 * parameters * (ranks - 1) / (ranks * gigabits * 10**9),
        "in seconds", "world_size", parameters=st.integers(10**6, 10**11), world_size=st.integers(1, 64),
        gigabits=st.integers(1, 900),
    )  # fmt: skip


def _counted(theirs, *arguments):
    """Call the learner's function; returns the result and the bytes that this rank sent. Every rank calls this."""
    first = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0][0]
    with Meter() as meter, Requests(first.dtype) as requests:
        result = theirs(*arguments)
    for sent in meter.sent:
        expect(
            sent.collective in ("send", "recv"),
            f"You called {sent.collective}; here it is to be built from send and recv.",
        )
    requests.expect_waited()
    return result, sent_bytes(meter)


def _expect_sent(sent, right, what):
    """Compare bytes, in words."""
    if sent <= right:
        return
    raise Wrong(
        f"The result is right, but this rank sends {sent} bytes; {what} are {right}. That is {sent / right:.3g} times "
        "as much: is something sent whole, or sent to everybody?"
    )


def _tensor(rank, length):
    """Another tensor on every rank, whose sums are exact."""
    return torch.arange(1.0, length + 1) * 10**rank


def broadcast(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for root in range(world_size):
        tensor = _tensor(rank, LENGTH)
        result, sent = _counted(theirs, tensor, root)
        expect(result is None, "broadcast works in place and returns nothing.")
        if root and all(other == _tensor(0, LENGTH).tolist() for other in of_all(tensor.tolist())):
            raise Wrong(f"With root {root}, every rank has rank 0's tensor. Is `root` used?")
        if not torch.equal(tensor, _tensor(root, LENGTH)):
            if torch.equal(tensor, _tensor(rank, LENGTH)):
                raise Wrong(f"With root {root}, this rank still has its own tensor: nothing arrived in it.")
            for other in range(world_size):
                if torch.equal(tensor, _tensor(other, LENGTH)):
                    raise Wrong(f"With root {root}, this rank has rank {other}'s tensor.")
            raise Wrong(f"With root {root}, this rank has {tensor.tolist()}.")
        most = max(of_all(sent))
        expect(
            most <= 4 * LENGTH,
            f"A rank sends {most} bytes, {most / (4 * LENGTH):g} times the tensor: the root serves everybody. In a "
            "chain every rank passes the tensor on once.",
        )
        messages = sum(of_all(sent)) // (4 * LENGTH)
        expect(
            messages < world_size,
            f"Right, but the tensor is sent {messages} times: {world_size - 1} do, the last rank need not pass it on.",
        )
    _given_to_all(theirs, 1, [2, 3], torch.bfloat16)
    on_two_ranks(lambda: _given_to_all(theirs, 1, [5], torch.float32))
    generated(
        lambda root, shape, dtype: _given_to_all(theirs, root, shape, dtype), most=15,
        root=st.integers(0, world_size - 1), shape=st.lists(st.integers(0, 3), max_size=2), dtype=DTYPES,
    )  # fmt: skip


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.float64])


def _given_to_all(theirs, root, shape, dtype):
    """The tensor is a part of a larger one, whose other numbers stay."""
    mine = _numbers(dist.get_rank(), shape, dtype)
    around = torch.full((mine.numel() + 2,), 99, dtype=dtype)
    tensor = around[1:-1].view(shape).copy_(mine)
    result, sent = _counted(theirs, tensor, root)
    where = f"A view of shape {shape} of {_name(dtype)}, root {root}: "
    expect(result is None, "broadcast works in place and returns nothing.")
    right = _numbers(root, shape, dtype)
    expect(torch.equal(tensor, right), f"{where}this rank has {tensor.tolist()}; it should be {right.tolist()}.")
    expect(around[0] == around[-1] == 99, f"{where}numbers beside the view have changed.")
    expect(sent <= mine.nbytes, f"{where}this rank sends {sent} bytes; the tensor has {mine.nbytes}.")
    together, due = sum(of_all(sent)), mine.nbytes * (dist.get_world_size() - 1)
    expect(together <= due, f"{where}all ranks together send {together} bytes; N − 1 times the tensor are {due}.")


def _numbers(rank, shape, dtype):
    """Another tensor on every rank."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) + 10 * (rank + 1)).to(dtype).view(shape)


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _expect_shape(found, right):
    expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
    shape, asked = tuple(found.shape), tuple(right.shape)
    expect(shape == asked, f"Your tensor has shape {shape}, it should be {asked}.")


def _expect_chunk(found, right, rank, world_size, chunks):
    """Is it the chunk that it should be; which one is it otherwise?"""
    _expect_shape(found, right)
    if torch.equal(found, right):
        return
    if torch.allclose(found, right / world_size):
        raise Wrong(f"That is the mean: it is {world_size} times too small. A sum is asked for.")
    if torch.allclose(found, right * world_size):
        raise Wrong(f"That is {world_size} times too large: something is added more than once.")
    for other, chunk in enumerate(chunks):
        if torch.equal(found, chunk):
            raise Wrong(f"That is chunk {other}, rightly summed; rank {rank} should end with chunk {rank}.")
    raise Wrong(f"That is {found.tolist()}, it should be {right.tolist()}.")


def reduce_scatter(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = sum(_tensor(r, world_size * LENGTH) for r in range(world_size))
    mine = _tensor(rank, world_size * LENGTH)
    found, sent = _counted(theirs, mine)
    if isinstance(found, torch.Tensor) and torch.equal(found, mine.chunk(world_size)[rank]):
        raise Wrong("That is this rank's own chunk: the parts of the other ranks are not added.")
    _expect_chunk(found, total.chunk(world_size)[rank], rank, world_size, total.chunk(world_size))
    expect_own(found, mine, "Your chunk", "the tensor")
    _expect_sent(sent, 4 * LENGTH * (world_size - 1), "N − 1 chunks")
    on_two_ranks(lambda: _scattered(theirs, 5))
    generated(lambda n: _scattered(theirs, n), most=6, n=st.integers(1, 9))


def _scattered(theirs, n):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tensors = [_tensor(r, world_size * n) for r in range(world_size)]
    found, sent = _counted(theirs, tensors[rank])
    right = torch.stack([tensor[rank * n : (rank + 1) * n] for tensor in tensors]).sum(0)
    where = f"Chunks of {n}: "
    expect_tensor(found, right, where)
    expect(torch.equal(found, right), f"{where}that is {found.tolist()}, it should be {right.tolist()}.")
    _expect_sent(sent, 4 * n * (world_size - 1), f"N − 1 chunks of {n} elements")


def all_gather(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    right = torch.cat([_tensor(r, LENGTH) for r in range(world_size)])
    found, sent = _counted(theirs, _tensor(rank, LENGTH))
    _expect_shape(found, right)
    if not torch.equal(found, right):
        if torch.equal(found.sort().values, right.sort().values):
            raise Wrong("All chunks are there, but not in the order of the ranks.")
        repeated = [r for r in range(world_size) if torch.equal(found[:LENGTH], _tensor(r, LENGTH))]
        if repeated and torch.equal(found, _tensor(repeated[0], LENGTH).repeat(world_size)):
            raise Wrong(f"That is rank {repeated[0]}'s chunk {world_size} times.")
        raise Wrong(f"That is {found.tolist()}, it should be {right.tolist()}.")
    _expect_sent(sent, 4 * LENGTH * (world_size - 1), "N − 1 chunks")
    _gathered(theirs, 3, torch.int64)
    on_two_ranks(lambda: _gathered(theirs, 5, torch.float32))
    generated(lambda n, dtype: _gathered(theirs, n, dtype), most=10, n=st.integers(1, 9), dtype=DTYPES)


def _gathered(theirs, n, dtype):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = _numbers(rank, [n], dtype)
    found, sent = _counted(theirs, mine)
    right = torch.cat([_numbers(r, [n], dtype) for r in range(world_size)])
    where = f"Chunks of {n} {_name(dtype)}: "
    expect_tensor(found, right, where)
    expect(torch.equal(found, right), f"{where}that is {found.tolist()}, it should be {right.tolist()}.")
    expect_own(found, mine, "Your result", "the chunk")
    _expect_sent(sent, mine.nbytes * (world_size - 1), f"N − 1 chunks of {mine.nbytes} bytes")


def all_reduce(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for length in (world_size * LENGTH + 1, world_size * LENGTH, 1, world_size * LENGTH - 1):
        right = sum(_tensor(r, length) for r in range(world_size))
        mine = _tensor(rank, length)
        found, sent = _counted(theirs, mine)
        expect(found is not None, "Your function returned nothing; the sum is asked for.")
        expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
        if found.shape == right.shape and torch.equal(found, _tensor(rank, length)):
            raise Wrong("That is this rank's own tensor, unchanged.")
        if length % world_size and found.shape != right.shape:
            raise Wrong(
                f"{length} elements on {world_size} ranks do not divide: you return {len(found)} of {length}. Add "
                "zeros, and cut them off again."
            )
        _expect_chunk(found, right, rank, world_size, [])
        expect_own(found, mine, "Your result", "the tensor")
        chunk = -(-length // world_size)
        _expect_sent(sent, 4 * 2 * (world_size - 1) * chunk, "2 (N − 1) chunks")
    on_two_ranks(lambda: _summed(theirs, 7))
    generated(lambda length: _summed(theirs, length), most=8, length=st.integers(1, 20))


def _summed(theirs, length):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found, sent = _counted(theirs, _tensor(rank, length))
    right = torch.arange(1.0, length + 1) * sum(10**r for r in range(world_size))
    where = f"Of length {length}: "
    expect_tensor(found, right, where)
    expect(torch.equal(found, right), f"{where}that is {found.tolist()}, it should be {right.tolist()}.")
    _expect_sent(sent, 4 * 2 * (world_size - 1) * -(-length // world_size), f"2 (N − 1) chunks of length {length}'s")


def all_to_all(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found, sent = _counted(theirs, [_piece(rank, to) for to in range(world_size)])
    expect(isinstance(found, list), f"Your function returned {found!r}; a list of tensors is asked for.")
    expect(len(found) == world_size, f"Your list has {len(found)} pieces; there are {world_size} ranks.")
    for source, piece in enumerate(found):
        expect_tensor(piece, _piece(source, rank), f"Entry {source}: ")
        if torch.equal(piece, _piece(source, rank)):
            continue
        if torch.equal(piece, _piece(rank, source)):
            raise Wrong(f"Entry {source} is this rank's own piece for rank {source}: nothing was received there.")
        for a in range(world_size):
            for b in range(world_size):
                if torch.equal(piece, _piece(a, b)):
                    raise Wrong(
                        f"Entry {source} is what rank {a} had for rank {b}; it should be what rank {source} had for "
                        f"rank {rank}."
                    )
        raise Wrong(f"Entry {source} is {piece.tolist()}.")
    _expect_sent(sent, 4 * LENGTH * (world_size - 1), "N − 1 pieces")
    _exchanged(theirs, [2, 3], torch.int64)
    on_two_ranks(lambda: _exchanged(theirs, [4], torch.float32))
    generated(
        lambda shape, dtype: _exchanged(theirs, shape, dtype), most=10,
        shape=st.lists(st.integers(1, 3), max_size=2), dtype=DTYPES,
    )  # fmt: skip


def _exchanged(theirs, shape, dtype):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pieces = [_numbers(world_size * rank + to, shape, dtype) for to in range(world_size)]
    found, sent = _counted(theirs, pieces)
    where = f"Pieces of shape {shape} of {_name(dtype)}: "
    expect(isinstance(found, list) and len(found) == world_size, f"{where}a list of {world_size} is asked for.")
    for source, piece in enumerate(found):
        right = _numbers(world_size * source + rank, shape, dtype)
        expect_tensor(piece, right, f"{where}entry {source}: ")
        expect(torch.equal(piece, right), f"{where}entry {source} is {piece.tolist()}, it should be {right.tolist()}.")
    _expect_sent(sent, pieces[0].nbytes * (world_size - 1), f"N − 1 pieces of {pieces[0].nbytes} bytes")


def _piece(source, to):
    return torch.full((LENGTH,), 10.0 * source + to)
