"""Checks of lesson 5. Those with ranks run on every rank."""

import math

import torch
import torch.distributed as dist

from lessons.cases import formula, generated, st
from lessons.checking import Wrong, expect, expect_number, is_number, is_whole
from lessons.meters import Counted, on_all_wires, unwritten_is_nan
from lessons.worlds import on_two_ranks
from strategies.ledger.wire import Meter

PARAMETERS = st.integers(0, 10**10)


def rank_bytes(theirs):
    for p, ranks in ((7_500_000_000, 64), (124_000_000, 6), (124_000_000, 8)):
        mistakes = {
            "That is DDP: the optimizer's 12 bytes per parameter have to be divided by the ranks.": 16 * p,
            "Everything is divided by the ranks there: that is ZeRO-3. ZeRO-1 leaves parameters and gradients "
            "whole.": 16 * p / ranks,
            "The gradients are divided as well: that is ZeRO-2.": 2 * p + 14 * p / ranks,
            "The master weights are missing: bf16 parameters need a float32 copy to be updated.": 4 * p + 8 * p / ranks,
            "One of AdamW's two moments is missing.": 4 * p + 8 * p / ranks,
            "The master weights are whole; only their owner updates them, so they are divided too.": (
                8 * p + 8 * p / ranks
            ),
            "The master weights have 2 bytes there; they are float32, 4.": 4 * p + 10 * p / ranks,
            "That is the optimizer's part alone.": 12 * p / ranks,
            "The gradients are missing: they are whole, 2 bytes each.": 2 * p + 12 * p / ranks,
            "The parameters are missing: they are whole, 2 bytes each.": 2 * p + 12 * p / ranks,
            "That has float32 parameters and gradients: 4 + 4 in place of 2 + 2.": 8 * p + 12 * p / ranks,
        }
        what = f"{p:,} parameters on {ranks} ranks, in bytes"
        expect_number(theirs(p, ranks), 4 * p + 12 * p / ranks, what, mistakes, ranks)
    formula(
        theirs, lambda p, n: p * (2 + 2 + (4 + 4 + 4) / n), "in bytes", "ranks",
        parameters=PARAMETERS, ranks=st.integers(1, 64),
    )  # fmt: skip


def wire_bytes(theirs):
    for p, ranks, scattered in ((7 * 10**9, 6, True), (124_000_000, 8, False), (124_000_000, 6, False)):
        once = (ranks - 1) / ranks * 2 * p
        passes = 2 if scattered else 3
        mistakes = {
            "The gathering of the updated parameters is missing.": (passes - 1) * once,
            "That is the payload; a ring sends (N − 1)/N of it per pass.": passes * 2 * p,
            "That is float32; gradients and parameters travel in bf16 here.": 2 * passes * once,
            "The parameters are gathered: one pass of the ring, not two as in an all-reduce.": (passes + 1) * once,
        }
        if scattered:
            mistakes["A reduce-scatter is one pass of the ring, half of an all-reduce."] = 3 * once
        else:
            mistakes["An all-reduce is a reduce-scatter and an all-gather: two passes of the ring, not one."] = 2 * once
        words = "reduce-scattered" if scattered else "all-reduced"
        what = f"{p:,} parameters on {ranks} ranks, gradients {words}, in bytes"
        expect_number(theirs(p, ranks, scattered), passes * once, what, mistakes, ranks)
    formula(
        theirs, lambda p, n, scattered: 2 * (p - p / n) * (2 if scattered else 3), "in bytes", "ranks",
        parameters=PARAMETERS, ranks=st.integers(1, 64), reduce_scatter=st.booleans(),
    )  # fmt: skip


def pieces(theirs):
    for numels, world_size in (([8], 2), ([5, 1, 6], 3), ([7, 2, 10, 3], 4), ([3], 3), ([4, 4], 2), ([4, 0, 5], 2)):
        _pieces(theirs, numels, world_size)
    generated(
        lambda numels, world_size: _pieces(theirs, numels, world_size),
        numels=st.lists(st.integers(0, 12), min_size=1, max_size=6), world_size=st.sampled_from([8, 6, 4, 3, 2, 1]),
    )  # fmt: skip


def _pieces(theirs, numels, world_size):
    where = f"For parameters of {numels} elements on {world_size} ranks: "
    told = [_told(theirs(list(numels), rank, world_size)) for rank in range(world_size)]
    count = [[0] * numel for numel in numels]
    for rank, found in enumerate(told):
        for i, start, stop in found:
            expect(0 <= i < len(numels), where + f"rank {rank} has a piece of parameter {i}, which there is not.")
            expect(start < stop, where + f"rank {rank} has an empty piece {(i, start, stop)}; leave it out.")
            if stop > numels[i] or start < 0:
                raise Wrong(
                    where + f"rank {rank} has elements [{start}, {stop}) of parameter {i}. A piece counts from its "
                    "parameter's first element, not from the buffer's, and ends with it: padding is no piece."
                )
            for element in range(start, stop):
                count[i][element] += 1
    if any(times > 1 for one in count for times in one):
        raise Wrong(where + "elements are updated on several ranks: slices must not overlap.")
    if lost := sum(times == 0 for one in count for times in one):
        raise Wrong(where + f"{lost} elements are updated nowhere: they would keep their first values for ever.")
    part = math.ceil(sum(numels) / (2 * world_size)) * 2
    buffer = [(i, element) for i, numel in enumerate(numels) for element in range(numel)]
    for rank, found in enumerate(told):
        mine = buffer[rank * part : (rank + 1) * part]
        held = sum(stop - start for _, start, stop in found)
        expect(
            held == len(mine),
            where + f"rank {rank} has {held} elements where {len(mine)} are due. Slices are equal, of {part} elements "
            "with the padding (a multiple of 2 · world_size in all), and cut through parameters.",
        )
        due = [(i, min(of), max(of) + 1) for i in dict(mine) if (of := [e for owner, e in mine if owner == i])]
        expect(sorted(found) != due or found == due, where + f"rank {rank}'s pieces are not in order: {found}.")
        expect(
            found == due,
            where + f"rank {rank} has {found}; its slice has {len(due)} pieces, one for each parameter, in the order "
            "of the buffer.",
        )


def _told(found):
    right = isinstance(found, list) and all(
        isinstance(piece, tuple) and len(piece) == 3 and all(map(is_whole, piece)) for piece in found
    )
    expect(right, f"Your function returned {found!r}; a list of tuples of three integers is asked for.")
    return found


def _same(a, b):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=1e-6)


def clip_norm(theirs):
    world_size = dist.get_world_size()
    _norm(theirs, torch.arange(1.0, 4 * world_size + 1), "")
    on_two_ranks(lambda: _norm(theirs, torch.arange(1.0, 11), ""))
    generated(
        lambda size, seed, scale: _norm(theirs, scale * _random(size * world_size, seed), f" (slices of {size})"),
        most=12, size=st.integers(1, 9), seed=st.integers(0, 99), scale=st.sampled_from([1.0, 0.0, 1e-3, 300.0]),
    )  # fmt: skip
    _norm(theirs, -torch.arange(4.0 * world_size), " (another gradient of the same size)")
    whole = _random(200 * world_size, 0)
    with Meter() as meter:
        _norm(theirs, whole, "")
    sent, most = on_all_wires(meter), 2 * (world_size - 1) * 8 * world_size  # a float64 of every rank's, to all
    expect(
        sent <= most,
        f"Right, but for {4 * len(whole)} bytes of gradient the ranks send {sent:.0f}. One number of each is enough.",
    )


def _random(size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _norm(theirs, whole, where):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    slices = whole.chunk(world_size)
    found = theirs(slices[rank])
    expect(is_number(found), f"Your function returned {found!r}; a plain number is asked for.")
    right = whole.double().norm().item()
    norms = torch.stack([part.norm() for part in slices])
    if not math.isclose(found, right, rel_tol=1e-5, abs_tol=1e-9):
        for message, value in {
            "That is the norm of this rank's slice: every rank would scale by its own factor.": slices[rank].norm(),
            "That is the sum of the ranks' norms. Norms do not add up; their squares do.": norms.sum(),
            "That is the square of the norm: the root is missing.": right**2,
            "That is the mean of the ranks' norms; the norm of the whole is asked for.": norms.mean(),
            "That is the largest of the ranks' norms; the norm of the whole is asked for.": norms.max(),
            "The squares are averaged over the ranks; they have to be added up.": right / world_size**0.5,
            "The slices are added up element by element. They are different elements of one gradient: add up their "
            "squares.": torch.stack(slices).sum(0).norm(),
            "That is the sum of the absolute values: the L1 norm.": whole.abs().sum(),
        }.items():
            expect(_same(right, float(value)) or not _same(found, float(value)), message + where)
        raise Wrong(f"You say {found:.6g}{where}; it should be the root of the sum of all squares, on every rank.")


def sharded_step(theirs):
    world_size = dist.get_world_size()
    size = 4 * world_size
    start = torch.linspace(-1, 1, size)
    gradients = [_random(size, seed) for seed in range(world_size)]
    _first_step(theirs, start, gradients)
    on_two_ranks(lambda: _steps(theirs, 6, 1, 2))
    generated(
        lambda part, seed, steps: _steps(theirs, part * world_size, seed, steps), most=10,
        part=st.integers(1, 7), seed=st.integers(0, 99), steps=st.integers(1, 3),
    )  # fmt: skip
    _whole_numbers(theirs)


def _first_step(theirs, start, gradients):
    """With an update so simple that a wrong result tells what was left out."""
    rank, world_size, size = dist.get_rank(), dist.get_world_size(), len(start)
    mean = torch.stack(gradients).mean(0)
    weights, sizes = start.clone(), []

    def update(some, gradient):
        sizes.append(some.numel())
        if some.shape != gradient.shape:
            raise Wrong(f"update got {some.numel()} weights and {gradient.numel()} gradients; cut both to the slice.")
        return some - 0.1 * gradient

    with unwritten_is_nan(), Meter() as meter:
        theirs(weights, gradients[rank].clone(), update)
    expect(len(sizes) == 1, f"update was called {len(sizes)} times; once, with this rank's slice, is asked for.")
    expect(
        sizes[0] != size,
        f"update was called with all {size} elements: it would keep state for all of them on every rank. That is DDP. "
        "Call it with this rank's slice.",
    )
    expect(sizes[0] * world_size == size, f"update got {sizes[0]} elements; a slice has {size // world_size}.")
    right = start - 0.1 * mean
    if _same(weights, right):
        sent, passes = on_all_wires(meter), (world_size - 1) * 4 * size
        expect(
            sent <= 3 * passes,
            f"Right, but it sends {sent / passes:g}Ψ. An all-reduce of the gradients is 2Ψ (a reduce-scatter half of "
            "that), and gathering the slices 1Ψ.",
        )
        return
    _named(weights, start, right, gradients)


def _named(weights, start, right, gradients):
    """Raises Wrong for weights that are not right, with the mistake if it is one of the usual ones."""
    rank, world_size, size = dist.get_rank(), dist.get_world_size(), len(start)
    mean = torch.stack(gradients).mean(0)
    mine = slice(rank * size // world_size, (rank + 1) * size // world_size)
    for message, value in {
        "The weights have not changed: the gathered slices have to be written into `weights`.": start,
        f"The gradients are world_size ({world_size}) times too large: all_reduce sums.": start
        - 0.1 * world_size * mean,
        f"The gradients are divided by the world size ({world_size}) twice.": start - 0.1 * mean / world_size,
        "The slices are there, but in another order: rank 0's comes first.": right.view(world_size, -1)
        .flip(0)
        .view(-1),
    }.items():
        expect(not _same(weights, value), message)
    if _same(weights[mine], right[mine]):
        raise Wrong(
            "This rank's slice is right, the others' are not: the updated slices were not gathered, and the ranks "
            "compute with different weights from now on."
        )
    for message, each in {
        "Each slice was updated by its rank's own gradient: the mean over the ranks is missing.": gradients,
        "Each slice was updated by its rank's own gradient, divided: the sum over the ranks is missing.": [
            gradient / world_size for gradient in gradients
        ],
    }.items():
        local = torch.cat([part.chunk(world_size)[r] for r, part in enumerate(each)])
        expect(not _same(weights, start - 0.1 * local), message)
    expect(bool(weights.isfinite().all()), "Some weights are not numbers: memory that nobody has written was read.")
    raise Wrong(f"The weights are up to {(weights - right).abs().max().item():.2g} away from DDP's.")


def _whole_numbers(theirs):
    """Numbers that no order of sums and no division rounds: nothing may be off, not by a millionth either."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    every = [2 * world_size * (torch.arange(3 * world_size) % 4 - r).float() for r in range(world_size)]
    start = torch.arange(3.0 * world_size) - 4
    for times in (1, 0):
        weights = start.clone()
        theirs(weights, every[rank] * times, lambda some, gradient: some - gradient)
        off = (weights - (start - times * torch.stack(every).mean(0))).abs().max().item()
        what = "whole numbers" if times else "zero"
        expect(off == 0, f"With gradients that are {what} the weights are {off:.2g} off: nothing else belongs to it.")


def _steps(theirs, size, seed, steps):
    """Some steps of an optimizer with a state, on weights that lie in the middle of something larger."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    around = torch.full((size + 4,), 7.0)
    weights = around[2:-2]
    weights.copy_(_random(size, seed))
    right, momentum = weights.clone(), torch.zeros(size)
    state, where = torch.zeros(size // world_size), f"With {size} weights, after {steps} steps, "

    def moved(some, gradient, moving):
        moving.mul_(0.5).add_(gradient)
        return 0.9 * some - 0.1 * (moving + moving**3)

    def update(some, gradient):
        expect(some.shape == state.shape == gradient.shape, f"{where}update got {some.numel()} elements.")
        return moved(some, gradient, state)

    calls = Counted(update)
    for step in range(steps):
        every = [_random(size, seed + 100 * (step + 1) + r) for r in range(world_size)]
        with unwritten_is_nan():
            theirs(weights, every[rank].clone(), calls)
        right = moved(right, torch.stack(every).mean(0), momentum)
    expect(calls.calls == steps, f"{where}update was called {calls.calls} times.")
    off = (weights - right).abs().max().item()
    expect(off < 1e-4, f"{where}the weights are up to {off:.2g} away from those of one process.")
    guards = torch.cat([around[:2], around[-2:]])
    expect(bool((guards == 7.0).all()), f"{where}something beside the weights was written, in the same memory.")
