"""Checks of lesson 4. Those with ranks run on every rank."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lessons.checking import Wrong, expect, expect_number
from strategies.ledger.wire import Meter


def micro_batches(theirs):
    for rows, local, ranks in ((512, 16, 8), (24, 4, 3), (8, 8, 1)):
        expect_number(
            theirs(rows, local, ranks),
            rows // (local * ranks),
            f"a global batch of {rows} rows, {local} rows per forward pass and {ranks} ranks",
            {
                "Every rank takes a part of the batch: divide by the ranks too.": rows / local,
                "That is the rows of a rank; it takes them in forward passes of a given size.": rows / ranks,
                "The ranks share the work; more of them means fewer micro-batches.": rows * ranks / local,
            },
        )
    for rows, local, ranks in ((10, 4, 2), (12, 4, 2)):
        try:
            found = theirs(rows, local, ranks)
        except ValueError:
            continue
        raise Wrong(
            f"{rows} rows do not divide into {ranks} ranks times {local} rows, but you say {found} micro-batches: a "
            "step would see another number of rows. Raise ValueError."
        )


def wire_bytes(theirs):
    for parameters, ranks, accumulation, no_sync in ((7 * 10**9, 8, 4, True), (124_000_000, 4, 3, False)):
        once = 2 * (ranks - 1) / ranks * 4 * parameters
        right = once if no_sync else accumulation * once
        words = "with" if no_sync else "without"
        expect_number(
            theirs(parameters, ranks, accumulation, no_sync),
            right,
            f"{parameters:,} parameters, {ranks} ranks and {accumulation} micro-batches {words} no_sync, in bytes",
            {
                "no_sync holds the all-reduce back until the last micro-batch: once a step.": (
                    accumulation * once if no_sync else -1
                ),
                "Without no_sync every backward pass reduces all gradients again.": -1 if no_sync else once,
                "That is the payload; a ring sends 2 (N − 1)/N of it.": 4 * parameters * right / once,
                "That is half of it: 2 bytes per gradient in place of 4, or one of the ring's two passes.": right / 2,
                "That is every rank's bytes together; one rank's are asked for.": right * ranks,
            },
        )


def my_rows(theirs):
    batch = torch.arange(24).view(12, 2)
    for world_size in (1, 2, 3, 4):
        parts = [theirs(batch, rank, world_size) for rank in range(world_size)]
        for rank, part in enumerate(parts):
            expect(isinstance(part, torch.Tensor), f"Your function returned {part!r}; a tensor is asked for.")
            expect(
                len(part) == 12 // world_size,
                f"Rank {rank} of {world_size} gets {len(part)} of 12 rows; it should be {12 // world_size}.",
            )
        if world_size > 1 and torch.equal(parts[0], parts[1]):
            raise Wrong(
                f"All {world_size} ranks get the same rows: each computes the same gradient, and a part of the batch "
                "is never seen."
            )
        seen = torch.cat(parts)[:, 0].sort().values
        if not torch.equal(seen, batch[:, 0]):
            lost = sorted(set(batch[:, 0].tolist()) - set(seen.tolist()))
            raise Wrong(f"On {world_size} ranks, {len(lost)} of 12 rows are on no rank and others on several.")


class Toy(nn.Module):
    """The mean square of a small network's output; one parameter takes no part."""

    def __init__(self, spare=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.spare = nn.Parameter(torch.zeros(2)) if spare else None

    def forward(self, x):
        return self.layers(x).square().mean()


def _data(rank, micro):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * rank + micro))


def _gradient(batches):
    """Of the mean loss over these batches, computed in this process alone."""
    model = Toy()
    (sum(model(batch) for batch in batches) / len(batches)).backward()
    return _flat(model)


def _flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _same(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def average_gradients(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = Toy(spare=True)
    weights = [p.detach().clone() for p in model.parameters()]
    model(_data(rank, 0)).backward()
    theirs(model)
    found = _flat(model)
    right = _gradient([_data(r, 0) for r in range(world_size)])
    local = _gradient([_data(rank, 0)])
    if any(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True)):
        raise Wrong("The parameters have changed. It is their gradients, p.grad, that have to be reduced.")
    if _same(found, right):
        return
    if _same(found, right * world_size):
        raise Wrong(
            f"Your gradients are world_size ({world_size}) times too large: all_reduce sums. Divide by the world size."
        )
    if _same(found, right / world_size):
        raise Wrong(f"Your gradients are world_size ({world_size}) times too small: they are divided twice.")
    if _same(found, local):
        raise Wrong("This rank's gradients are still its own: nothing was averaged.")
    if _same(found, local / world_size):
        raise Wrong("This rank's gradients are its own, divided: the sum over the ranks is missing.")
    raise Wrong(f"Your gradients are up to {(found - right).abs().max().item():.2g} away from the mean of all ranks'.")


def make_buckets(theirs):
    sizes = (3, 10, 2, 2, 5, 40, 1)
    parameters = [nn.Parameter(torch.zeros(n)) for n in sizes]
    found = theirs(list(parameters), 32)  # 8 elements of float32
    expect(isinstance(found, list), f"Your function returned {found!r}; a list of lists is asked for.")
    numbers = {id(p): i for i, p in enumerate(parameters)}
    order = [[numbers[id(p)] for p in bucket] for bucket in found]
    flat = [number for bucket in order for number in bucket]
    if lost := sorted(set(range(len(sizes))) - set(flat)):
        raise Wrong(f"Parameter {lost[0]} of {len(sizes)} is in no bucket: its gradient would never be averaged.")
    expect(len(flat) == len(set(flat)), "A parameter is in two buckets: its gradient would be reduced twice.")
    expect([] not in order, "There is an empty bucket.")
    expect(
        flat != sorted(flat),
        "The buckets begin with the model's first parameters, whose gradients backward makes last: nothing could be "
        "sent before the end. Go through them in reverse.",
    )
    expect(flat == sorted(flat, reverse=True), f"Backward's order is the reverse of the model's; yours is {flat}.")
    for bucket in order:
        held = sum(4 * sizes[number] for number in bucket)
        expect(
            held <= 32 or len(bucket) == 1,
            f"A bucket of at most 32 bytes holds {held}: parameters of {[sizes[n] for n in bucket]} float32 elements. "
            "(Are you counting elements for bytes?)",
        )
    right = _full(sizes)
    expect(order == right, f"{len(order)} buckets where {len(right)} do: fill each as far as the next gradient fits.")


def _full(sizes):
    """Greedy from the end, 8 elements each."""
    buckets, held = [], 0
    for number in reversed(range(len(sizes))):
        if not buckets or held + sizes[number] > 8:
            buckets.append([])
            held = 0
        buckets[-1].append(number)
        held += sizes[number]
    return buckets


def accumulate(theirs):
    rank, world_size, count = dist.get_rank(), dist.get_world_size(), 3
    model = DistributedDataParallel(Toy())
    mine = [_data(rank, micro) for micro in range(count)]
    with Meter() as meter:
        theirs(model, mine)
    found = _flat(model.module)
    expect(len(found) > 0, "There are no gradients: is backward() called?")
    right = _gradient([_data(r, micro) for r in range(world_size) for micro in range(count)])
    last = _gradient([_data(r, count - 1) for r in range(world_size)])
    if not _same(found, right):
        for message, value in {
            f"Your gradients are {count} times too large: they are summed over the {count} micro-batches. Divide each "
            "loss by their number.": right * count,
            f"Your gradients are {count} times too small: they are divided by the number of micro-batches twice.": (
                right / count
            ),
            "This rank's gradients are its own: no all-reduce took place. Leave the last micro-batch outside of "
            "no_sync.": _gradient(mine),
            "This rank's gradients are its own, and summed: no all-reduce, and no division.": _gradient(mine) * count,
            "Only the last micro-batch is in your gradients; those before are lost.": last,
            "Only the last micro-batch is in your gradients, divided by their number.": last / count,
        }.items():
            expect(not _same(found, value), message)
        raise Wrong(f"Your gradients are up to {(found - right).abs().max().item():.2g} away from the right ones.")
    sent = sum(s.payload_bytes for s in meter.sent if s.collective == "all_reduce" and not s.bookkeeping)
    once = 4 * len(found)
    expect(
        sent <= once,
        f"The gradients are right, but {sent} bytes were all-reduced where {once} do: {sent / once:g} times. Hold the "
        "all-reduce back with no_sync until the last micro-batch.",
    )
