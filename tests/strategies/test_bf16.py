"""In bf16 every strategy takes float32's steps, but for rounding; weights that are kept in bf16 are caught.

Ten steps, in losses and in how far every parameter has moved: that shows more, and sooner, than a late loss does.
A curve over 200 steps of the trainer is in tests/speedrun/test_train.py.
"""

import functools

import pytest
import torch
import torch.distributed as dist

from shardrun.certify.equivalence import Case, Trace, compare, run_reference, run_strategy
from strategies.optimizer import IntervalOptimizer, local
from tests.ranks import RankPool
from tests.strategies.small import STRATEGIES, build, make

CASES = [Case(optimizer, accumulation=2, rows=24, steps=10) for optimizer in ("adamw", "muon")]
LOSS = 1e-3
"""Relative, for every step. Found: up to 2.5e-4."""
MOVE = 0.25
"""Of a parameter's way from its initial values. Found: up to 0.12 (Muon lifts what is small), and 0.84 with
weights that are kept in bf16."""


@functools.cache
def reference(case: Case) -> Trace:
    """One process in float32, without anything of `strategies`."""
    return run_reference(case)


def train(name: str, case: Case, round_weights: bool) -> Trace:
    """On a rank, in bf16. round_weights: the classic wrong version, in which the optimizer adds to bf16 weights."""
    original = IntervalOptimizer.step

    def step_and_round(self: IntervalOptimizer) -> None:
        original(self)
        for group in self.param_groups:
            for holder in group["params"]:
                with torch.no_grad():
                    local(holder).copy_(local(holder).bfloat16())

    with pytest.MonkeyPatch.context() as patch:
        if round_weights:
            patch.setattr(IntervalOptimizer, "step", step_and_round)
        return run_strategy(case, make(name, "bf16"), dist.get_rank(), dist.get_world_size())


def apart(trace: Trace, case: Case) -> tuple[float, float]:
    """From float32: the largest relative difference of a loss, and the largest of a move."""
    expected = reference(case)
    loss = max(abs(ours / theirs - 1) for ours, theirs in zip(trace.losses, expected.losses, strict=True))
    start = {name: p.detach() for name, p in build(case).named_parameters()}
    moves = [
        (trace.weights[name] - weight).norm() / (weight - start[name]).norm()
        for name, weight in expected.weights.items()
    ]
    return loss, torch.stack(moves).max().item()


@pytest.mark.ranks
@pytest.mark.parametrize("name", STRATEGIES)
def test_bf16_follows_float32(ranks: RankPool, name: str) -> None:
    for case in CASES:
        trace = ranks.run(2, train, name, case, False)[0]
        loss, move = apart(trace, case)
        print(f"{name}, {case.optimizer}: a loss {loss:.1e} apart, a parameter's move {move:.3f}")
        assert 0 < loss < LOSS and 0 < move < MOVE
        assert compare(trace, reference(case), "bf16").equal  # as `shardrun certify` would say


@pytest.mark.ranks
@pytest.mark.parametrize("name", STRATEGIES)
def test_weights_kept_in_bf16_are_caught(ranks: RankPool, name: str) -> None:
    _, move = apart(ranks.run(2, train, name, CASES[0], True)[0], CASES[0])
    assert move > 2 * MOVE
