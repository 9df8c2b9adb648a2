"""Checks of lesson 3. Those of the collectives run on every rank; what is sent is counted by the wire meter."""

import torch
import torch.distributed as dist

from lessons.checking import Wrong, expect, expect_number
from strategies.ledger.wire import Meter

LENGTH = 4


def ring_bytes(theirs):
    for elements, world_size in ((7 * 10**9, 8), (1000, 2), (1000, 1)):
        whole = 4 * elements
        share = (world_size - 1) / world_size
        expect_number(
            theirs(elements, world_size),
            2 * share * whole,
            f"{elements:,} elements on {world_size} ranks, in bytes",
            {
                "On one rank nothing is sent.": 2 * whole if world_size == 1 else -1,
                "That is half of it: the reduce-scatter. The all-gather sends as much again.": share * whole,
                "That is twice the tensor. A rank never sends its own chunk's last step: (N − 1)/N of it.": 2 * whole,
                "That sends the whole tensor to every other rank; a ring passes on sums, an Nth at a time.": (
                    (world_size - 1) * whole
                ),
                "That is all ranks together; one rank's wire is asked for.": 2 * (world_size - 1) * whole,
                "That counts elements; a float32 has 4 bytes.": 2 * share * elements,
            },
        )


def reduction_seconds(theirs):
    parameters, world_size, gigabits = 7 * 10**9, 8, 400.0
    right = 2 * 7 / 8 * 4 * parameters / 50e9
    expect_number(
        theirs(parameters, world_size, gigabits),
        right,
        f"{parameters:,} parameters, {world_size} ranks and {gigabits:g} Gb/s, in seconds",
        {
            "That takes gigabits for gigabytes: a byte has 8 bits.": right / 8,
            "That is 64 times too long: bits counted twice?": right * 8,
            "That is the tensor once through the link; a ring sends 2 (N − 1)/N of it.": 4 * parameters / 50e9,
            "That is half of it: the reduce-scatter without the all-gather.": right / 2,
            "That is in milliseconds.": right * 1e3,
        },
    )


def _counted(theirs, *arguments):
    """Call the learner's function; returns the result and the bytes that this rank sent. Every rank calls this."""
    with Meter() as meter:
        result = theirs(*arguments)
    for sent in meter.sent:
        expect(
            sent.collective in ("send", "recv"),
            f"You called {sent.collective}; here it is to be built from send and recv.",
        )
    return result, sum(sent.payload_bytes for sent in meter.sent)


def _every_rank(value):
    """value of all ranks, by rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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
        if root and all(other == _tensor(0, LENGTH).tolist() for other in _every_rank(tensor.tolist())):
            raise Wrong(f"With root {root}, every rank has rank 0's tensor. Is `root` used?")
        if not torch.equal(tensor, _tensor(root, LENGTH)):
            if torch.equal(tensor, _tensor(rank, LENGTH)):
                raise Wrong(f"With root {root}, this rank still has its own tensor: nothing arrived in it.")
            for other in range(world_size):
                if torch.equal(tensor, _tensor(other, LENGTH)):
                    raise Wrong(f"With root {root}, this rank has rank {other}'s tensor.")
            raise Wrong(f"With root {root}, this rank has {tensor.tolist()}.")
        most = max(_every_rank(sent))
        expect(
            most <= 4 * LENGTH,
            f"A rank sends {most} bytes, {most / (4 * LENGTH):g} times the tensor: the root serves everybody. In a "
            "chain every rank passes the tensor on once.",
        )


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
    found, sent = _counted(theirs, mine.clone())
    if isinstance(found, torch.Tensor) and torch.equal(found, mine.chunk(world_size)[rank]):
        raise Wrong("That is this rank's own chunk: the parts of the other ranks are not added.")
    _expect_chunk(found, total.chunk(world_size)[rank], rank, world_size, total.chunk(world_size))
    _expect_sent(sent, 4 * LENGTH * (world_size - 1), "N − 1 chunks")


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


def all_reduce(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for length in (world_size * LENGTH + 1, world_size * LENGTH):
        right = sum(_tensor(r, length) for r in range(world_size))
        found, sent = _counted(theirs, _tensor(rank, length))
        expect(found is not None, "Your function returned nothing; the sum is asked for.")
        if found.shape == right.shape and torch.equal(found, _tensor(rank, length)):
            raise Wrong("That is this rank's own tensor, unchanged.")
        if length % world_size and found.shape != right.shape:
            raise Wrong(
                f"{length} elements on {world_size} ranks do not divide: you return {len(found)} of {length}. Add "
                "zeros, and cut them off again."
            )
        _expect_chunk(found, right, rank, world_size, [])
        chunk = -(-length // world_size)
        _expect_sent(sent, 4 * 2 * (world_size - 1) * chunk, "2 (N − 1) chunks")


def all_to_all(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found, sent = _counted(theirs, [_piece(rank, to) for to in range(world_size)])
    expect(isinstance(found, list), f"Your function returned {found!r}; a list of tensors is asked for.")
    expect(len(found) == world_size, f"Your list has {len(found)} pieces; there are {world_size} ranks.")
    for source, piece in enumerate(found):
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


def _piece(source, to):
    return torch.full((LENGTH,), 10.0 * source + to)
