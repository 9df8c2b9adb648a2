"""Checks of lesson 7. Those with ranks run on every rank."""

import math

import torch
import torch.distributed as dist

from lessons.cases import formula, generated, st
from lessons.checking import Wrong, expect, expect_number, expect_own, expect_tensor, rounded_alike
from lessons.meters import on_all_wires, unwritten_is_nan
from lessons.worlds import on_two_ranks
from strategies.ledger.wire import Meter

PARAMETERS = st.integers(0, 10**10)
SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rank_bytes(theirs):
    for p, ranks in ((7_500_000_000, 64), (124_000_000, 6), (124_000_000, 8)):
        mistakes = {
            "That is DDP: nothing is divided by the ranks.": 16 * p,
            "That is ZeRO-1: parameters and gradients are divided by the ranks too.": 4 * p + 12 * p / ranks,
            "That is ZeRO-2: the parameters are whole there.": 2 * p + 14 * p / ranks,
            "The master weights are missing: bf16 parameters need a float32 copy to be updated.": 12 * p / ranks,
            "One of AdamW's two moments is missing.": 12 * p / ranks,
            "The gradients are missing, or the parameters: 2 bytes each.": 14 * p / ranks,
            "The master weights have 2 bytes there; they are float32, 4.": 14 * p / ranks,
            "That has float32 parameters and gradients: 4 + 4 in place of 2 + 2.": 20 * p / ranks,
            "A copy of the gathered parameters is in there. They are whole for a moment only, not between steps.": (
                2 * p + 16 * p / ranks
            ),
        }
        what = f"{p:,} parameters on {ranks} ranks, in bytes"
        expect_number(theirs(p, ranks), 16 * p / ranks, what, mistakes, None if ranks == 8 else ranks)
    formula(
        theirs, lambda p, n: p / n * (2 + 2 + 4 + 4 + 4), "in bytes", "ranks",
        parameters=PARAMETERS, ranks=st.integers(1, 64),
    )  # fmt: skip


def wire_bytes(theirs):
    for p, ranks, a, keep in ((7 * 10**9, 6, 4, False), (124_000_000, 8, 3, True), (124_000_000, 6, 1, False)):
        once = (ranks - 1) / ranks * 2 * p
        passes = 2 if keep else 3
        mistakes = {
            "Gradients are reduce-scattered, one pass of the ring; an all-reduce would be two.": a
            * (passes + 1)
            * once,
            "That is the payload; a ring sends (N − 1)/N of it per pass.": a * passes * 2 * p,
            "That is float32; gradients and parameters travel in bf16 here.": 2 * a * passes * once,
            "The reduction of the gradients is missing.": a * (passes - 1) * once,
            "The updated parameters are not gathered: every rank keeps what it has updated.": (a * passes + 1) * once,
        }
        if a > 1:
            mistakes |= {
                "That is one micro-batch. Neither whole gradients nor whole parameters stay until the next one, so "
                "everything is sent at every micro-batch.": passes * once,
                "The gradients are reduced at every micro-batch: there is no room for whole ones.": (
                    a * (passes - 1) + 1
                )
                * once,
                "Parameters are gathered at every micro-batch, not once a step.": (a + passes - 1) * once,
            }
        if keep:
            mistakes["Parameters that are kept are gathered once per micro-batch."] = a * 3 * once
        else:
            mistakes["Parameters that were let go after forward are gathered again for backward."] = a * 2 * once
        words = "kept for backward" if keep else "let go after forward"
        what = f"{p:,} parameters, {ranks} ranks, {a} micro-batches, parameters {words}, in bytes"
        expect_number(theirs(p, ranks, a, keep), a * passes * once, what, mistakes, ranks)
    formula(
        theirs, lambda p, n, a, keep: 2 * (p - p / n) * (2 * a if keep else 3 * a), "in bytes", "ranks",
        parameters=PARAMETERS, ranks=st.integers(1, 64), accumulation=st.integers(1, 16), keep=st.booleans(),
    )  # fmt: skip


def most_gathered(theirs):
    for numels, ahead in (
        ([5, 1, 6, 2, 7, 3], 1),
        ([5, 1, 1, 7, 2, 3], 0),
        ([4, 4, 9], 2),
        ([1, 2, 10, 1], 2),
        ([9, 1, 1, 4], 1),
        ([3, 5], 4),
    ):
        _most(theirs, numels, ahead)
    generated(
        lambda numels, ahead: _most(theirs, numels, ahead),
        numels=st.lists(st.integers(0, 20), min_size=1, max_size=8), ahead=st.integers(0, 9),
    )  # fmt: skip


def _most(theirs, numels, ahead):
    windows = [numels[i : i + ahead + 1] for i in range(len(numels))]
    right = max(
        sum(numel for j, numel in enumerate(numels) if runs <= j <= runs + ahead) for runs in range(len(numels))
    )
    known = {
        "That is all of them: as if none were let go after its use.": sum(numels),
        "That is the largest module by itself; those gathered ahead are whole at the same time.": max(numels),
        "That counts one module too few: the one that runs and those ahead of it.": (
            max(sum(window[: max(ahead, 1)]) for window in windows)
        ),
        "That counts one module too many: what has run is let go before the next one begins.": max(
            sum(numels[i : i + ahead + 2]) for i in range(len(numels))
        ),
        "That is the ahead + 1 largest modules. Only neighbours are whole at the same time.": sum(
            sorted(numels)[-ahead - 1 :]
        ),
        "That is the beginning alone; a later moment may hold more.": sum(windows[0]),
        "The window is shorter at the end of the list; it does not go on at its beginning.": max(
            sum((numels * (ahead + 2))[i : i + ahead + 1]) for i in range(len(numels))
        ),
    }
    expect_number(
        theirs(list(numels), ahead), right, f"modules of {numels} elements and {ahead} gathered ahead",
        {message: value for message, value in known.items() if value != right},
    )  # fmt: skip


def _cut(parameter, rank, world_size):
    """Element by element: the reference, and what other ranks' parts are made with."""
    part = math.ceil(parameter.numel() / world_size)
    flat = torch.zeros(part * world_size, dtype=parameter.dtype)
    flat[: parameter.numel()] = parameter.reshape(-1)
    return flat[rank * part : (rank + 1) * part].clone()


def _numbered(shape, dtype="float32", first=1):
    """Where the first is 1 none is zero, as padding is."""
    return torch.arange(float(first), math.prod(shape) + first).view(shape).to(DTYPES[dtype])


def cut(theirs):
    for shape, world_size in (((4, 3), 2), ((5, 3), 2), ((7,), 3), ((2,), 4), ((), 2), ((5, 0), 2)):
        _parts(theirs, _numbered(shape), world_size)
    _parts(theirs, _numbered((3, 4)).T, 2, ", stored by columns")
    _parts(theirs, _numbered((3, 5), "bfloat16"), 4)
    generated(
        lambda shape, dtype, world_size, first: _parts(theirs, _numbered(shape, dtype, first), world_size), most=40,
        shape=st.lists(st.integers(0, 5), max_size=3).map(tuple), dtype=st.sampled_from(list(DTYPES)),
        world_size=st.sampled_from([8, 6, 4, 3, 2, 1]), first=st.integers(0, 60),
    )  # fmt: skip


def _parts(theirs, parameter, world_size, how=""):
    where = f"A parameter of {list(parameter.shape)}{how} on {world_size} ranks: "
    with unwritten_is_nan():
        parts = [theirs(parameter, rank, world_size) for rank in range(world_size)]
    right = [_cut(parameter, rank, world_size) for rank in range(world_size)]
    for rank, (part, due) in enumerate(zip(parts, right, strict=True)):
        expect(isinstance(part, torch.Tensor), f"Your function returned {part!r}; a tensor is asked for.")
        if part.dim() != 1:
            raise Wrong(where + f"your part has the shape {list(part.shape)}; flatten the parameter first.")
        if part.numel() < due.numel() and all(p.numel() == parts[0].numel() for p in parts):
            raise Wrong(
                where + f"{part.numel() * world_size} elements are on all ranks together: the rest is lost. Round "
                "the part up, not down, and pad."
            )
        if part.numel() != due.numel():
            raise Wrong(
                where + f"rank {rank} has {part.numel()} elements, and all should have {due.numel()}: collectives "
                "like all_gather want equal parts. Fill up with zeros."
            )
        expect_tensor(part, due, where)
        own = part.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr() or not part.numel()
        if not own or part.untyped_storage().nbytes() > part.element_size() * due.numel():
            raise Wrong(
                where + "your part is a view into the whole parameter, which can never be freed as long as the "
                "part lives. Return a copy (clone)."
            )
        if torch.equal(part, due):
            continue
        filled = torch.equal(part[due != 0], due[due != 0])
        expect(not filled, where + f"rank {rank} has {part.tolist()}: fill up with zeros, which add nothing to a sum.")
        raise Wrong(where + f"rank {rank} has {part.tolist()}, it should be {due.tolist()}.")


def whole(theirs):
    for shape, dtype in (((7,), "float32"), ((5, 2), "float32"), ((4, 3), "float32"), ((), "float32")):
        _whole(theirs, shape, dtype)
    _whole(theirs, (2, 5), "bfloat16")
    _whole(theirs, (4, 3), "float32", first=-5)  # with a zero, and another one than before
    on_two_ranks(lambda: _whole(theirs, (3, 5), "float32"))
    with Meter() as meter:
        _whole(theirs, (10, 9), "float32")
    world_size = dist.get_world_size()
    sent, once = on_all_wires(meter), (world_size - 1) * 4 * 90
    expect(
        sent <= once,
        f"Right, but it sends {sent / once:.3g} times what is needed. An all-gather of the parts passes each of them "
        "round the ring once.",
    )
    generated(
        lambda shape, dtype, first: _whole(theirs, shape, dtype, first), most=10,
        shape=SHAPES, dtype=st.sampled_from(list(DTYPES)), first=st.integers(-9, 60),
    )  # fmt: skip


def _whole(theirs, shape, dtype, first=1):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    right = _numbered(shape, dtype, first)
    mine = _cut(right, rank, world_size)
    with unwritten_is_nan():
        found = theirs(mine, shape)
    expect(isinstance(found, torch.Tensor), f"Your function returned {found!r}; a tensor is asked for.")
    if found.numel() > right.numel():
        raise Wrong(
            f"{found.numel()} elements for a parameter of {list(shape)}: the padding at the end has to be cut off."
        )
    expect(found.numel() == right.numel(), f"{found.numel()} elements for a parameter of {list(shape)}.")
    expect(tuple(found.shape) == shape, f"The shape is {list(found.shape)}, and should be {list(shape)}.")
    expect(found.dtype == right.dtype, f"The parameter is in {found.dtype}; its parts are in {right.dtype}.")
    expect_own(found, mine, name="this rank's part")
    if torch.equal(found, right):
        return
    numbers = found.flatten().tolist()
    if any(number != number for number in numbers):
        raise Wrong(f"The parameter has nan: {numbers}. Was it read before it had arrived? A collective that runs "
                    "in the background has to be waited for.")  # fmt: skip
    if numbers == mine.repeat(world_size)[: len(numbers)].tolist():
        raise Wrong(f"That is rank {rank}'s own part, {world_size} times: the others' are missing.")
    if set(numbers) <= {0.0, *right.flatten().tolist()} and len(set(numbers)) == len(numbers):
        raise Wrong(f"The elements are in another order: {numbers}. Parts lie rank after rank.")
    if torch.equal(found.float(), right.float() * world_size):
        raise Wrong(f"The elements are {world_size} times too large: parts are put end to end, not added up.")
    raise Wrong(f"The elements are others: {numbers}, and should be {right.flatten().tolist()}.")


def linear_backward(theirs):
    world_size = dist.get_world_size()
    with Meter() as meter:
        _backward(theirs, 6, (4, 5), 0, apart=False)
    sent = on_all_wires(meter)
    if any(call.collective == "all_reduce" and not call.bookkeeping for call in meter.sent):
        raise Wrong(
            "The result is right, but an all-reduce brings the whole mean gradient to every rank, at twice the bytes. "
            "A reduce-scatter leaves each its part."
        )
    once = (world_size - 1) * 4 * world_size * math.ceil(20 / world_size)
    expect(
        sent <= 2 * once,
        f"The result is right, but it sends {sent / once:.3g} times the weight. Once to gather it, once to "
        "reduce-scatter its gradient is enough.",
    )
    _backward(theirs, 1, (1, 2), 1)
    _backward(theirs, 6, (4, 5), 2)  # nothing is kept from the first call
    on_two_ranks(lambda: _backward(theirs, 2, (3, 5), 3))
    _backward(theirs, 2, (2, 3), 4, times=0.0)
    generated(
        lambda rows, outputs, inputs, seed: _backward(theirs, rows, (outputs, inputs), seed), most=8,
        rows=st.integers(1, 4), outputs=st.integers(1, 5), inputs=st.integers(1, 5), seed=st.integers(0, 99),
    )  # fmt: skip


def _drawn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _backward(theirs, rows, shape, seed, apart=True, times=1.0):
    """apart: whether the part must not hang on anything larger; times: the gradient that comes in; of zero nothing is
    left, however small.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    outputs, inputs = shape
    where = f"With W {outputs} × {inputs} and {rows} rows: "
    weight = _drawn(shape, 1000 + seed)
    every = [
        (_drawn((rows, inputs), 10 * seed + r), times * _drawn((rows, outputs), 500 + seed + r))
        for r in range(world_size)
    ]
    x, upstream = every[rank]
    mine = _cut(weight, rank, world_size)
    with unwritten_is_nan():
        answer = theirs(x, upstream, mine, shape)
    expect(
        isinstance(answer, tuple) and len(answer) == 2,
        f"Your function returned {type(answer).__name__}; the gradient of x and a part of W's are asked for.",
    )
    of_x, part = answer
    for each in answer:
        expect(isinstance(each, torch.Tensor), f"Your function returned {each!r}; two tensors are asked for.")
    expect(
        of_x.shape == x.shape,
        where + f"The gradient of x has the shape {list(of_x.shape)}; x has {list(x.shape)}. It is upstream · W.",
    )
    expect_tensor(of_x, x, where)
    expect(
        rounded_alike(of_x, upstream @ weight, (upstream.abs() @ weight.abs()).max().item()),
        where + "The gradient of x is wrong: it is upstream · W.",
    )
    gradients = torch.stack([up.T @ its for its, up in every])
    mean = gradients.mean(0)
    right = _cut(mean, rank, world_size)
    if part.numel() == mean.numel() != right.numel():
        raise Wrong(where + "You return the whole gradient of W. This rank updates its part, and keeps no more.")
    expect(
        part.shape == right.shape,
        where + f"Your part of W's gradient is {list(part.shape)}; the part of W is {list(right.shape)}, with padding.",
    )
    expect_tensor(part, right, where)
    if not rounded_alike(part, right, max((up.T.abs() @ its.abs()).max().item() for its, up in every)):
        _named_part(part, right, gradients, where)
    expect(
        not apart or part.untyped_storage().nbytes() <= 4 * part.numel(),
        where + "Your part is a view into the whole gradient of W, which stays in memory as long as the part does. "
        "Copy it (clone).",
    )
    expect_own(part, mine, "Your part of the gradient", "the part of W")


def _named_part(part, right, gradients, where):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for message, value in {
        f"Your part is world_size ({world_size}) times too large: reduce_scatter sums.": right * world_size,
        f"Your part is divided by the world size ({world_size}) twice.": right / world_size,
        "Your part comes from this rank's rows alone: nothing was reduced over the ranks.": _cut(
            gradients[rank], rank, world_size
        ),
        "Your part comes from this rank's rows alone, divided: the sum over the ranks is missing.": _cut(
            gradients[rank] / world_size, rank, world_size
        ),
        "That is rank 0's part on every rank.": _cut(gradients.mean(0), 0, world_size),
        "The gradient of W is transposed before it is cut: it is upstreamᵀ · x.": _cut(
            gradients.mean(0).T, rank, world_size
        ),
    }.items():
        near = [torch.allclose(each, value, rtol=1e-4, atol=1e-4) for each in (part, right)]
        expect(near != [True, False], where + message)
    expect(
        bool(part.isfinite().all()), where + "Your part of W's gradient has nan: memory was read before it was filled."
    )
    raise Wrong(where + f"Your part of W's gradient is up to {(part - right).abs().max():.2g} away from the mean.")
