"""Checks of lesson 4. Those with ranks run on every rank."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lessons.cases import formula, generated, st
from lessons.checking import Wrong, expect, expect_number, is_whole
from lessons.worlds import on_two_ranks
from strategies.ledger.wire import Meter


def micro_batches(theirs):
    for rows, local, ranks in ((512, 16, 8), (360, 5, 6), (24, 4, 3), (8, 8, 1)):
        _counted(
            theirs, rows, local, ranks,
            {
                "Every rank takes a part of the batch: divide by the ranks too.": rows / local,
                "That is the rows of a rank; it takes them in forward passes of a given size.": rows / ranks,
                "The ranks share the work; more of them means fewer micro-batches.": rows * ranks / local,
                "That is the rows of all ranks in one forward pass.": local * ranks,
            },
        )  # fmt: skip
    for rows, local, ranks in ((10, 4, 2), (12, 4, 2), (20, 4, 3), (4, 8, 1), (7, 1, 2)):
        _refused(theirs, rows, local, ranks)
    generated(
        lambda accumulation, local, ranks, rest: (
            _refused(theirs, accumulation * local * ranks + rest, local, ranks)
            if rest % (local * ranks)
            else _counted(theirs, accumulation * local * ranks + rest, local, ranks, {})
        ),
        accumulation=st.integers(1, 9), local=st.integers(1, 9), ranks=st.integers(1, 9), rest=st.integers(0, 9),
    )  # fmt: skip


def _counted(theirs, rows, local, ranks, mistakes):
    words = f"a global batch of {rows} rows, {local} rows per forward pass and {ranks} ranks"
    try:
        found = theirs(rows, local, ranks)
    except ValueError as error:
        raise Wrong(f"You raise ValueError for {words}, which does divide.") from error
    right = next(a for a in range(rows + 1) if a * local * ranks == rows)
    expect_number(found, right, words, mistakes, ranks)
    expect(is_whole(found), f"You say {found!r} for {words}: a number of forward passes is an int. Divide with //.")


def _refused(theirs, rows, local, ranks):
    try:
        found = theirs(rows, local, ranks)
    except ValueError:
        return
    except AssertionError as error:
        raise Wrong(
            f"Where {rows} rows do not divide you raise an AssertionError; a ValueError is asked for."
        ) from error
    raise Wrong(
        f"{rows} rows do not divide into {ranks} ranks times {local} rows, but you say {found} micro-batches: a "
        "step would see another number of rows. Raise ValueError."
    )


def wire_bytes(theirs):
    cases = ((7 * 10**9, 6, 5, True), (124_000_000, 8, 3, False), (1000, 4, 1, False), (1000, 1, 4, True))
    for parameters, ranks, accumulation, no_sync in cases:
        once = 2 * (ranks - 1) / ranks * 4 * parameters
        times = 1 if no_sync else accumulation
        words = "with" if no_sync else "without"
        expect_number(
            theirs(parameters, ranks, accumulation, no_sync),
            times * once,
            f"{parameters:,} parameters, {ranks} ranks and {accumulation} micro-batches {words} no_sync, in bytes",
            {
                "no_sync holds the all-reduce back until the last micro-batch: once a step.": (
                    accumulation * once if no_sync else -1
                ),
                "Without no_sync every backward pass reduces all gradients again.": -1 if no_sync else once,
                "That is the payload; a ring sends 2 (N − 1)/N of it.": 4 * parameters * times,
                "That is twice the gradients: a ring sends 2 (N − 1)/N of them, never all of both halves.": (
                    8 * parameters * times
                ),
                "That is half of it: 2 bytes per gradient in place of 4, or one of the ring's two passes.": (
                    times * once / 2
                ),
                "That sends all gradients to every other rank; a ring passes on sums.": (
                    (ranks - 1) * 4 * parameters * times
                ),
                "That is every rank's bytes together; one rank's are asked for.": times * once * ranks,
            },
            ranks,
        )
    formula(
        theirs,
        lambda parameters, ranks, accumulation, no_sync: (
            8 * (parameters - parameters / ranks) * (1 if no_sync else accumulation)
        ),
        "in bytes", "ranks", parameters=st.integers(0, 10**10), ranks=st.integers(1, 64),
        accumulation=st.integers(1, 16), no_sync=st.booleans(),
    )  # fmt: skip


def my_rows(theirs):
    for world_size in (8, 6, 1, 2, 3, 4):
        _shared_out(theirs, torch.arange(48).view(24, 2), world_size)
    generated(
        lambda each, world_size, length, dtype: _shared_out(
            theirs, torch.arange(each * world_size * length).view(-1, length).to(dtype), world_size
        ),
        each=st.integers(1, 4), world_size=st.integers(1, 9), length=st.integers(1, 3),
        dtype=st.sampled_from([torch.int64, torch.float32]),
    )  # fmt: skip


def _shared_out(theirs, batch, world_size):
    rows = len(batch)
    parts = [theirs(batch, rank, world_size) for rank in range(world_size)]
    for rank, part in enumerate(parts):
        expect(isinstance(part, torch.Tensor), f"Your function returned {part!r}; a tensor is asked for.")
        expect(
            part.shape[1:] == batch.shape[1:] and part.dtype == batch.dtype,
            f"Rank {rank} of {world_size} gets a tensor of {list(part.shape)} {part.dtype} from a batch of "
            f"{list(batch.shape)} {batch.dtype}: whole rows are asked for, as they are.",
        )
        expect(
            len(part) == rows // world_size,
            f"Rank {rank} of {world_size} gets {len(part)} of {rows} rows; it should be {rows // world_size}.",
        )
    if world_size > 1 and torch.equal(parts[0], parts[1]):
        raise Wrong(
            f"All {world_size} ranks get the same rows: each computes the same gradient, and a part of the batch "
            "is never seen."
        )
    seen = sorted(torch.cat(parts).tolist())
    if seen != batch.tolist():
        lost = [row for row in batch.tolist() if row not in seen]
        raise Wrong(f"On {world_size} ranks, {len(lost)} of {rows} rows are on no rank and others on several.")


class Toy(nn.Module):
    """The mean square of a small network's output; one parameter takes no part. Notes its forwards and backwards."""

    def __init__(self, spare=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        self.spare = nn.Parameter(torch.zeros(2)) if spare else None
        self.events = []

    def forward(self, x):
        self.events.append(f"a forward pass of {len(x)} rows")
        loss = self.layers(x).square().mean()
        if loss.requires_grad:
            loss.register_hook(lambda gradient: self.events.append("backward"))
        return loss


def _data(rank, micro, rows=4):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(10 * rank + micro))


def _gradient(batches):
    """Of the mean loss over these batches, computed in this process alone."""
    model = Toy()
    (sum(model(batch) for batch in batches) / len(batches)).backward()
    return _flat(model)


def _flat(model):
    """All gradients; a parameter that takes no part has none, or zeros."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    expect(all(not g.any() for name, g in named if name == "spare"), "A parameter that takes no part has a gradient.")
    return torch.cat([torch.zeros(0), *(g.flatten() for name, g in named if name != "spare")])


def _same(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def average_gradients(theirs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = Toy(spare=True)
    weights = [p.detach().clone() for p in model.parameters()]
    model(_data(rank, 0)).backward()
    with Meter() as meter:
        theirs(model)
    found = _flat(model)
    right = _gradient([_data(r, 0) for r in range(world_size)])
    local = _gradient([_data(rank, 0)])
    if any(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True)):
        raise Wrong("The parameters have changed. It is their gradients, p.grad, that have to be reduced.")
    if _same(found, right):
        _sent_once(meter, 4 * (len(found) + 2), world_size)
        on_two_ranks(lambda: _averaged(theirs, [[2, 3], [4]], torch.float32, -1))
        generated(
            lambda shapes, dtype, without: _averaged(theirs, shapes, dtype, without), most=12,
            shapes=st.lists(st.lists(st.integers(1, 3), max_size=2), min_size=1, max_size=4),
            dtype=st.sampled_from([torch.float32, torch.float64]), without=st.integers(-1, 3),
        )  # fmt: skip
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
    due, own = Toy(), Toy()
    for reference, ranks in ((due, range(world_size)), (own, [rank])):
        (sum(reference(_data(r, 0)) for r in ranks) / len(ranks)).backward()
    for (name, p), q in zip(own.named_parameters(), due.parameters(), strict=True):
        left = model.get_parameter(name).grad
        if left is not None and _same(left, p.grad) and not _same(left, q.grad):
            raise Wrong(f"The gradient of {name} is still this rank's own; others are averaged.")
    raise Wrong(
        f"Your gradients are up to {(found - right).abs().max().item():.2g} away from the mean of all ranks' gradients."
    )


def _sent_once(meter, size, world_size):
    """What a ring all-reduce of so many bytes sends, and no more (single numbers apart)."""
    sent = sum(line.ring_bytes for line in meter.lines() if line.purpose == "payload")
    once = 2 * (world_size - 1) / world_size * size
    expect(
        sent <= once,
        f"Right, but a rank puts {sent:.0f} bytes on its wire, {sent / once:.2g} times what an all-reduce of the "
        "gradients does.",
    )


class _Parameters(nn.Module):
    def __init__(self, shapes, dtype):
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes)


def _averaged(theirs, shapes, dtype, without):
    """Gradients are views of one flat tensor, as in a bucket; one parameter has none."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, without = _Parameters(shapes, dtype), without if len(shapes) > 1 else -1
    size = sum(p.numel() for p in model.parameters())
    flats = [torch.randn(size, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world_size)]
    due = (torch.stack(flats).double().sum(0) / world_size).split([p.numel() for p in model.parameters()])
    mine = flats[rank].split([p.numel() for p in model.parameters()])
    for number, p in enumerate(model.parameters()):
        p.grad = None if number == without else mine[number].view_as(p)
    with Meter() as meter:
        theirs(model)
    where = f"Parameters of shapes {shapes} of {str(dtype).removeprefix('torch.')}: "
    for number, p in enumerate(model.parameters()):
        if number == without:
            expect(p.grad is None or not p.grad.any(), f"{where}number {number}, without a gradient, has one now.")
            continue
        off = (p.grad.double() - due[number].view_as(p)).abs().max().item()
        expect(
            off <= 8 * torch.finfo(dtype).eps * max(flat.abs().max().item() for flat in flats),
            f"{where}the gradient of number {number} is up to {off:.2g} away from the ranks' mean.",
        )
    _sent_once(meter, size * dtype.itemsize, world_size)


def make_buckets(theirs):
    float32, bfloat16 = torch.float32, torch.bfloat16
    _buckets(theirs, [(n, float32) for n in (3, 10, 2, 2, 5, 40, 1)], 32)
    _buckets(theirs, [(4, float32), (100, float32)], 32)
    _buckets(theirs, [(4, float32), (4, float32)], 32)  # exactly full
    _buckets(theirs, [(8, bfloat16)] * 4, 32)
    _buckets(theirs, [(1, float32), (12, bfloat16), (4, bfloat16)], 32)
    _buckets(theirs, [(1, bfloat16), (8, float32), (8, float32)], 32)
    _buckets(theirs, [], 32)
    generated(
        lambda parameters, bucket_bytes: _buckets(theirs, parameters, bucket_bytes),
        parameters=st.lists(
            st.tuples(st.integers(1, 12), st.sampled_from([float32, bfloat16, torch.float64])), max_size=6
        ),
        bucket_bytes=st.integers(1, 64),
    )


def _buckets(theirs, described, most):
    """described: elements and dtype of each parameter. No reference: what holds for the right buckets alone."""
    parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in described]
    sizes = [p.nbytes for p in parameters]
    found = theirs(list(parameters), most)
    kinds = sorted({str(dtype).removeprefix("torch.") for _, dtype in described})
    where = f"Gradients of {sizes} bytes ({', '.join(kinds) or 'none'}), buckets of {most}: "
    expect(
        isinstance(found, list) and all(isinstance(bucket, list) for bucket in found),
        f"Your function returned {found!r}; a list of lists is asked for.",
    )
    numbers = {id(p): i for i, p in enumerate(parameters)}
    strange = [each for bucket in found for each in bucket if id(each) not in numbers]
    expect(not strange, f"{where}a bucket holds something that is none of the parameters: the same objects are due.")
    order = [[numbers[id(p)] for p in bucket] for bucket in found]
    flat = [number for bucket in order for number in bucket]
    if lost := sorted(set(range(len(sizes))) - set(flat)):
        raise Wrong(
            f"{where}parameter {lost[0]} of {len(sizes)} is in no bucket: its gradient would never be averaged."
        )
    expect(len(flat) == len(set(flat)), f"{where}a parameter is in two buckets: its gradient would be reduced twice.")
    expect(
        [] not in order,
        f"{where}there is an empty bucket. Where the first gradient is larger than a bucket, none has been begun "
        "before it.",
    )
    expect(
        len(flat) < 2 or flat != sorted(flat),
        "The buckets begin with the model's first parameters, whose gradients backward makes last: nothing could be "
        "sent before the end. Go through them in reverse.",
    )
    expect(
        flat == sorted(flat, reverse=True), f"{where}backward's order is the reverse of the model's; yours is {flat}."
    )
    for bucket in order:
        held = [sizes[number] for number in bucket]
        expect(
            sum(held) <= most or len(bucket) == 1,
            f"{where}one of yours holds {held}, {sum(held)} bytes. (Are you counting elements for bytes?)",
        )
    for bucket, following in zip(order, order[1:], strict=False):
        held, more = sum(sizes[number] for number in bucket), sizes[following[0]]
        if held + more <= most:
            bytes_of_float32 = 4 * sum(described[number][0] for number in [*bucket, following[0]])
            hint = " Does every element take 4 bytes? Ask element_size()." if bytes_of_float32 > most else ""
            raise Wrong(
                f"{where}one of yours holds {held} bytes, and the next gradient, of {more}, would fit too: fill each "
                f"as far as it goes.{hint}"
            )


def accumulate(theirs):
    model = DistributedDataParallel(Toy())
    for count, rows in ((3, 4), (1, 4), (4, 1), (2, 3)):
        model.zero_grad()
        _accumulated(theirs, model, count, rows)


def _accumulated(theirs, model, count, rows):
    """On one model again and again: what an earlier call leaves behind shows."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = [_data(rank, micro, rows) for micro in range(count)]
    model.module.events.clear()
    with Meter() as meter:
        theirs(model, mine)
    found, events = _flat(model.module), model.module.events
    where = f"{count} micro-batches of {rows} rows: "
    expect(len(found) > 0, "There are no gradients: is backward() called?")
    right = _gradient([_data(r, micro, rows) for r in range(world_size) for micro in range(count)])
    last = _gradient([_data(r, count - 1, rows) for r in range(world_size)])
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
            "Your gradients are summed over the ranks too: DDP has averaged them already.": right * world_size,
            "Your gradients are divided by the number of ranks too: DDP does that.": right / world_size,
        }.items():
            expect(not _same(found, value), where + message)
        raise Wrong(
            f"{where}your gradients are up to {(found - right).abs().max().item():.2g} away from the right ones."
        )
    forwards = [event for event in events if event != "backward"]
    expect(
        forwards == [f"a forward pass of {rows} rows"] * count,
        f"{where}the gradients are right, but there was {', '.join(forwards)}. One a micro-batch is due: a micro-batch "
        "is what fits into memory, and together they do not.",
    )
    expect(
        events[1::2] == ["backward"] * count,
        f"{where}the gradients are right, but a micro-batch's forward pass began before the backward pass of the one "
        "before: the activations of both are there at once. Call backward() for each.",
    )
    sent = sum(s.payload_bytes for s in meter.sent if s.collective == "all_reduce" and not s.bookkeeping)
    once = 4 * len(found)
    expect(
        sent <= once,
        f"{where}the gradients are right, but {sent} bytes were all-reduced where {once} do: {sent / once:g} times. "
        "Hold the all-reduce back with no_sync until the last micro-batch.",
    )
    _sent_once(meter, once, world_size)
    expect(
        model.require_backward_grad_sync,
        f"{where}your function leaves the model in no_sync: the next backward pass would send nothing.",
    )
