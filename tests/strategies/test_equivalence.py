"""Every strategy gives the single-process run's losses, gradient norms and weights; wrong ones are caught and
located.
"""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardrun.equivalence import Case, Trace, compare, first_parting, run_reference, run_strategy
from strategies import matrices, select
from strategies.base import Settings, Strategy
from strategies.matrices import Place
from tests.ranks import RankPool

STRATEGIES = ("single", "ddp", "fsdp", "fsdp_no_reshard", "zero1", "zero2", "zero3")
CASES = [
    Case(optimizer=optimizer, accumulation=accumulation, tied=tied)
    for optimizer in ("adamw", "muon")
    for accumulation in (1, 3)
    for tied in (False, True)
]


def make(name: str) -> Strategy:
    """A strategy in fp32 on CPU over the ranks of this process's group."""
    engine: dict[str, Any] = {}
    if name.startswith("fsdp"):
        engine = {"reshard_after_forward": name == "fsdp", "wrap": ["Block"]}
    if name.startswith("zero"):
        engine = {"zero_optimization": {"stage": int(name[-1])}}
    place = Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return select.make(name.partition("_")[0], Settings(place, "fp32", engine))


@functools.cache
def reference(case: Case, phases: bool = False) -> Trace:
    return run_reference(case, phases)


def train(name: str, case: Case, phases: bool = False) -> Trace | None:
    """On a rank: the trace, from rank 0 alone."""
    trace = run_strategy(case, make(name), dist.get_rank(), dist.get_world_size(), phases)
    return trace if dist.get_rank() == 0 else None


def as_id(case: Case) -> str:
    return f"{case.optimizer}-x{case.accumulation}-{'tied' if case.tied else 'untied'}"


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_equals_the_single_process_run(ranks: RankPool, name: str, world_size: int) -> None:
    if name == "single" and world_size > 1:
        return
    for case in CASES:
        trace = ranks.run(world_size, train, name, case)[0]
        verdict = compare(trace, reference(case))
        assert verdict.equal, f"{as_id(case)}: {verdict}"
        assert min(reference(case).norms) > 3 * case.config().optimizer.clip, "clipping must be active at every step"


# Classic wrong versions. Each breaks the product's code inside the ranks and must be caught, in the right phase.


def train_broken(name: str, case: Case, breakage: str) -> Trace | None:
    with pytest.MonkeyPatch.context() as patch:
        {
            "summed not averaged": break_average,
            "accumulation scaled twice": break_accumulation,
            "shards orthogonalised": break_exchange,
            "local clip norm": break_norm,
            "parameter reduced": break_reduce,
        }[breakage](patch, name)
        return train(name, case, True)


def break_average(patch: pytest.MonkeyPatch, name: str) -> None:
    """Gradients are summed over the ranks, not averaged: the loss arrives world_size times too large."""
    strategy = type(make(name))
    original = strategy.backward
    patch.setattr(strategy, "backward", lambda self, loss: original(self, loss * dist.get_world_size()))


def break_accumulation(patch: pytest.MonkeyPatch, name: str) -> None:
    """The loss is divided by the accumulation once more than it should be."""
    strategy = type(make(name))
    original = strategy.backward
    patch.setattr(strategy, "backward", lambda self, loss: original(self, loss / self.accumulation))


def break_exchange(patch: pytest.MonkeyPatch, name: str) -> None:
    """Every rank orthogonalises the piece that it holds, as if it were the matrix."""

    def shards(whole: Any, local: Any, transform: Any, apply: Any, place: Place) -> None:
        for matrix in whole:
            if (part := local[matrix.name]).numel():
                columns = matrix.shape[1]
                rows = -(-part.numel() // columns)
                padded = torch.zeros(rows * columns)
                padded[: part.numel()] = part
                apply(matrix.name, transform(padded.view(1, rows, columns)).reshape(-1)[: part.numel()])

    patch.setattr(matrices, "transform_sharded", shards)


def break_norm(patch: pytest.MonkeyPatch, name: str) -> None:
    """Every rank clips by the norm of what it holds itself."""
    module = __import__(f"strategies.{name}", fromlist=["global_norm"])

    def local_norm(sharded: list[torch.Tensor], replicated: list[torch.Tensor], place: Place) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([*sharded, *replicated])

    patch.setattr(module, "global_norm", local_norm)


def break_reduce(patch: pytest.MonkeyPatch, name: str) -> None:
    """The owners receive the reduced parameter in place of its gradient."""
    import strategies.ddp as ddp

    original = ddp.reduce_to_owners

    def reduce_parameters(whole: Any, gradients: Any, place: Place) -> Any:
        reduced = original(whole, gradients, place)
        return {name: torch.full_like(tensor, 0.01) for name, tensor in reduced.items()}

    patch.setattr(ddp, "reduce_to_owners", reduce_parameters)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("breakage", "name", "phase"),
    [
        *(("summed not averaged", name, "reduce") for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
        *(("accumulation scaled twice", name, "reduce") for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")),
        *(("shards orthogonalised", name, "update") for name in ("fsdp", "zero3")),
        *(("local clip norm", name, "clip") for name in ("ddp", "fsdp")),
        ("parameter reduced", "ddp", "reduce"),
    ],
)
def test_a_broken_strategy_is_caught_and_located(ranks: RankPool, breakage: str, name: str, phase: str) -> None:
    case = Case(optimizer="muon", accumulation=3, steps=5)
    trace = ranks.run(2, train_broken, name, case, breakage)[0]
    assert not compare(trace, reference(case)).equal
    where = first_parting(trace, reference(case, True))
    assert where.startswith(f"step 0, {phase}: "), where


@pytest.mark.ranks
@pytest.mark.parametrize("name", ("ddp", "fsdp", "zero1", "zero2", "zero3"))
def test_an_intact_strategy_parts_nowhere(ranks: RankPool, name: str) -> None:
    case = Case(optimizer="muon", accumulation=3, steps=5)
    trace = ranks.run(2, train, name, case, True)[0]
    assert set(trace.phases[0]) == {"reduce", "clip", "update"}
    assert all(set(phase) == set(trace.weights) for phase in trace.phases[0].values())
    assert first_parting(trace, reference(case, True)).startswith("no single tensor")
