"""Every strategy gives the single-process run's losses, gradient norms and weights; wrong ones are caught and
located.
"""

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrun.certify.equivalence import Case, Trace, compare, first_parting, run_reference, run_strategy
from speedrun.model import GPT
from strategies import catalogue, matrices
from strategies.mesh import Place
from strategies.optimizer import IntervalOptimizer, Slice
from tests.ranks import RankPool
from tests.strategies.small import STRATEGIES, make, prepared, recipe_of

MATRIX = [("single", 1), *((name, world_size) for name in STRATEGIES for world_size in (1, 2, 3, 4))]


def cases(world_size: int) -> list[Case]:
    """Half of optimizer × accumulation × head, such that every two of them meet in every way, and the record.

    An even world size takes the one half, an odd one the other: every strategy sees all eight.
    """
    every = list(itertools.product(("adamw", "muon"), (1, 2), (False, True)))
    half = [
        Case(optimizer=optimizer, accumulation=accumulation, tied=tied, rows=24, steps=5)
        for optimizer, accumulation, tied in every
        if ((optimizer == "muon") + accumulation + tied + world_size) % 2 == 0
    ]
    return [*half, Case(record=True, rows=24, steps=6)]


def as_id(case: Case) -> str:
    parts = "record" if case.record else "tied" if case.tied else "untied"
    return f"{case.optimizer}-x{case.accumulation}-{parts}"


@functools.cache
def reference(case: Case, phases: bool = False) -> Trace:
    return run_reference(case, phases)


def train(name: str, case: Case, phases: bool = False) -> Trace | None:
    """On a rank: the trace, from rank 0 alone."""
    trace = run_strategy(case, make(name), dist.get_rank(), dist.get_world_size(), phases)
    return trace if dist.get_rank() == 0 else None


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "world_size"), MATRIX)
def test_every_strategy_equals_the_single_process_run(ranks: RankPool, name: str, world_size: int) -> None:
    for case in cases(world_size):
        check(ranks.run(world_size, train, name, case)[0], case)


def test_the_cases_cover_every_pair_at_every_world_size_and_all_under_every_strategy() -> None:
    for world_size in (1, 2, 3, 4):
        taken = [(case.optimizer, case.accumulation, case.tied) for case in cases(world_size) if not case.record]
        assert len(taken) == 4
        for one, other in itertools.combinations(range(3), 2):
            assert len({(case[one], case[other]) for case in taken}) == 4
    assert {*cases(1), *cases(2)} == {*cases(3), *cases(4)} and len({*cases(1), *cases(2)}) == 9


@pytest.mark.ranks
@pytest.mark.parametrize(
    "case", (Case(accumulation=3, rows=36, steps=5), Case(accumulation=3, tied=True, rows=36, steps=5)), ids=as_id
)
def test_fsdp_that_keeps_gathered_parameters_equals_it_too(ranks: RankPool, case: Case) -> None:
    check(ranks.run(3, train, "fsdp_no_reshard", case)[0], case)


def check(trace: Trace, case: Case) -> None:
    verdict = compare(trace, reference(case))
    assert verdict.equal, f"{as_id(case)}: {verdict}"
    assert min(reference(case).norms) > 3 * case.config().optimizer.clip, "clipping must be active at every step"


# Classic wrong versions. Each breaks the product's code inside the ranks and must be caught, in the right phase.


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
                update = transform(padded.view(1, rows, columns), [matrix]).reshape(-1)[: part.numel()]
                apply([matrix.name], [update])

    patch.setattr(matrices, "transform_sharded", shards)


def break_norm(patch: pytest.MonkeyPatch, name: str) -> None:
    """Every rank clips by the norm of what it holds itself."""
    module = importlib.import_module(f"{catalogue.FOLDERS[name]}.engine")

    def local_norm(spoken_for: list[Tensor], place: Place) -> Tensor:
        return nn.utils.get_total_norm(spoken_for)

    patch.setattr(module, "global_norm", local_norm)


def break_reduce(patch: pytest.MonkeyPatch, name: str) -> None:
    """The owners receive the mean of a parameter in place of the mean of its gradient, by the real reduce-scatter."""
    from strategies.ddp.engine import DDP

    original = DDP._reduce_matrices

    def reduce_parameters(self: DDP) -> set[str]:
        for matrix in self.matrices:
            self.parameters[matrix.name].grad = self.parameters[matrix.name].detach().clone()
        return original(self)

    patch.setattr(DDP, "_reduce_matrices", reduce_parameters)


def break_tie(patch: pytest.MonkeyPatch, name: str) -> None:
    """The head becomes a parameter of its own before the strategy sees the model, as a copy of the embedding."""
    draw = GPT.initial

    def initial(model: GPT, seed: int) -> Any:
        values = draw(model, seed)
        return lambda name, start, stop: values("embed.weight" if name == "head.weight" else name, start, stop)

    patch.setattr(GPT, "_tie", lambda model: None)
    patch.setattr(GPT, "initial", initial)


def break_holders(patch: pytest.MonkeyPatch, name: str) -> None:
    """The optimizer keeps the parameters that it was built with, which sharding has replaced in the model."""
    built, bind = IntervalOptimizer.__init__, IntervalOptimizer.bind

    def remember(self: Any, model: nn.Module, recipe: Any) -> None:
        built(self, model, recipe)
        self.before = dict(model.named_parameters())

    def bind_those(self: Any, slices: Iterable[Slice], place: Place) -> None:
        for group in self.param_groups:
            group["params"] = [self.before[n] for n, rule in self.rules.items() if rule is group["rule"]]
        bind(self, [dataclasses.replace(piece, holder=self.before[piece.name]) for piece in slices], place)

    patch.setattr(IntervalOptimizer, "__init__", remember)
    patch.setattr(IntervalOptimizer, "bind", bind_those)


BREAKAGES = {
    "summed not averaged": break_average,
    "accumulation scaled twice": break_accumulation,
    "shards orthogonalised": break_exchange,
    "local clip norm": break_norm,
    "parameter reduced": break_reduce,
    "tied weights untied": break_tie,
    "optimizer built before sharding": break_holders,
}


def train_broken(name: str, case: Case, breakage: str) -> Trace | None:
    with pytest.MonkeyPatch.context() as patch:
        BREAKAGES[breakage](patch, name)
        return train(name, case, True)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("breakage", "name", "world_size", "where"),
    [
        *(("summed not averaged", name, 2, "step 0, reduce") for name in STRATEGIES),
        *(("accumulation scaled twice", name, 2, "step 0, reduce") for name in STRATEGIES),
        *(("shards orthogonalised", name, 3, "step 0, update") for name in ("fsdp", "zero3")),
        # ZeRO-1 and -2 cut only the matrices that lie across a boundary: at two ranks none, at three one from each
        # MLP's input side, whose gradient at step 0 is zero because the projection behind it starts at zero.
        *(("shards orthogonalised", name, 3, "step 1, update") for name in ("zero1", "zero2")),
        *(("local clip norm", name, 2, "step 0, clip") for name in ("ddp", "fsdp")),
        ("parameter reduced", "ddp", 2, "step 0, reduce"),
    ],
)
def test_a_broken_strategy_is_caught_and_located(
    ranks: RankPool, breakage: str, name: str, world_size: int, where: str
) -> None:
    case = Case(optimizer="muon", accumulation=3, rows=36, steps=2)
    trace = ranks.run(world_size, train_broken, name, case, breakage)[0]
    assert not compare(trace, reference(case)).equal
    parting = first_parting(trace, reference(case, True))
    assert parting.startswith(f"{where}: "), parting


@pytest.mark.ranks
def test_a_head_that_is_no_longer_tied_is_caught_and_located(ranks: RankPool) -> None:
    case = Case(optimizer="muon", tied=True, rows=36, steps=2)
    trace = ranks.run(2, train_broken, "ddp", case, "tied weights untied")[0]
    with pytest.raises(ValueError, match="head.weight"):  # a parameter more than the reference has
        compare(trace, reference(case))
    where = first_parting(trace, reference(case, True))
    assert where.startswith("step 0, reduce: embed.weight"), where


def prepare_untied() -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as error:
        tied = recipe_of(Case(tied=True))
        break_tie(patch, "ddp")
        prepared(make("ddp"), Case(tied=True), tied)
    return str(error.value)


@pytest.mark.ranks
def test_a_recipe_made_before_the_head_was_untied_is_refused(ranks: RankPool) -> None:
    assert "'head.weight'" in ranks.run(2, prepare_untied)[0]


@pytest.mark.ranks
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_an_optimizer_that_holds_the_unsharded_parameters_is_refused(ranks: RankPool, optimizer: str) -> None:
    assert "has no gradient" in ranks.run(2, refused, "fsdp", Case(optimizer), "optimizer built before sharding")[0]


def refused(name: str, case: Case, breakage: str) -> str:
    with pytest.raises(Exception) as error:
        train_broken(name, case, breakage)
    return f"{error.type.__name__}: {error.value}"


@pytest.mark.ranks
@pytest.mark.parametrize("name", STRATEGIES)
def test_an_intact_strategy_parts_nowhere(ranks: RankPool, name: str) -> None:
    case = Case(optimizer="muon", accumulation=3, rows=36, steps=3)
    trace = ranks.run(2, train, name, case, True)[0]
    assert set(trace.phases[0]) == {"reduce", "clip", "update"}
    assert all(set(phase) == set(trace.weights) for phase in trace.phases[0].values())
    assert first_parting(trace, reference(case, True)).startswith("no single tensor")
