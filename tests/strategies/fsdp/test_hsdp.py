"""HSDP: sharded within replicas. Against one process, against its own books, and to and from other strategies."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from shardrun.certify.equivalence import WEIGHT_TOLERANCE, Case, compare, run_reference, run_strategy
from speedrun.books.shapes import scenario_of
from strategies import catalogue
from strategies.base import Precision, Strategy
from strategies.checkpoint.folder import find_checkpoint
from strategies.checkpoint.format import read_index
from strategies.forecast.predict import predict_memory
from strategies.forecast.traffic import predict_traffic
from strategies.fsdp import engine
from strategies.ledger.memory import measure
from strategies.ledger.wire import Meter
from tests.ranks import RankPool
from tests.strategies.checkpoint.runs import CASE, load_and_train, train_and_save
from tests.strategies.small import forward_backward, make, prepared

RANKS = 4
"""Two replicas of two ranks."""


def hsdp(precision: Precision = "fp32") -> Strategy:
    return make("hsdp", precision)


def train(case: Case, broken: bool = False) -> Any:
    """On a rank. broken: every replica keeps its own gradients."""
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            patch.setattr(engine, "fully_shard", unaveraged(engine.fully_shard))
        trace = run_strategy(case, hsdp(), dist.get_rank(), dist.get_world_size())
    return trace if dist.get_rank() == 0 else None


def unaveraged(fully_shard: Any) -> Any:
    """fully_shard on the replica's own ranks, as if there were no others."""
    return lambda module, mesh, **options: fully_shard(module, mesh=mesh["shard"], **options)


@pytest.mark.ranks
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_two_replicas_of_two_ranks_are_one_process(ranks: RankPool, optimizer: str) -> None:
    case = Case(optimizer=optimizer, accumulation=3, tied=optimizer == "muon", rows=36, steps=6)
    verdict = compare(ranks.run(RANKS, train, case)[0], run_reference(case))
    assert verdict.equal, str(verdict)


@pytest.mark.ranks
def test_the_records_optimizer(ranks: RankPool) -> None:
    """NorMuon's state lies with a matrix's owner in every replica."""
    case = Case(accumulation=3, record=True, rows=36, steps=12)
    verdict = compare(ranks.run(RANKS, train, case)[0], run_reference(case))
    assert verdict.equal, str(verdict)


@pytest.mark.ranks
def test_replicas_that_are_not_averaged_are_caught(ranks: RankPool) -> None:
    case = Case(accumulation=1, rows=36, steps=3)
    assert not compare(ranks.run(RANKS, train, case, True)[0], run_reference(case)).equal


def watch(case: Case, precision: Precision) -> tuple[dict[str, dict[str, int]], dict[tuple[str, str, bool], Any]]:
    """On a rank: what is held at three moments of the second step, and what it sent, by axis."""
    strategy = prepared(hsdp(precision), case)
    held = {"after prepare": measure(strategy.held())}
    for step in range(2):
        with Meter(strategy.axes) as meter:
            for i in range(case.accumulation):
                forward_backward(strategy, step, last=i == case.accumulation - 1)
            held["after backward"] = measure(strategy.held())
            strategy.step()
        held["after step"] = measure(strategy.held())
    lines = {
        (line.collective, line.axis, line.purpose == "bookkeeping"): (line.calls, line.payload_bytes, line.ring_bytes)
        for line in meter.lines()
    }
    return held, lines


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_predicted_equals_measured_with_each_collectives_axis(ranks: RankPool, precision: Precision) -> None:
    case = Case(accumulation=2, record=precision == "fp32")
    settings = {"reshard_after_forward": True, "wrap": ["Block"], "replicas": 2}
    scenario = scenario_of(case.config(), "hsdp", RANKS, precision, case.accumulation, settings)
    for rank, (held, sent) in enumerate(ranks.run(RANKS, watch, case, precision)):
        for moment, predicted in predict_memory(scenario)[rank].items():
            for category, expected in predicted.items():
                assert held[moment].get(category, 0) == expected, (rank, moment, category)
        entries = predict_traffic(scenario, rank)
        assert {entry.axis for entry in entries} == {"shard", "replicate"}
        expected = {(e.collective, e.axis, e.purpose == "bookkeeping"): (e.calls, e.payload_bytes) for e in entries}
        assert {key: line[:2] for key, line in sent.items()} == expected
        assert sum(line[2] for line in sent.values()) == pytest.approx(sum(e.ring_bytes for e in entries))


OTHERS = (("single", 1), ("ddp", 2), ("fsdp", 3), ("zero1", 3), ("zero2", 2), ("zero3", 3))
"""Every other strategy, and on how many ranks."""


def test_the_others_are_all() -> None:
    assert {name for name, _ in OTHERS} | {"hsdp"} == set(catalogue.names())


@pytest.mark.ranks
def test_its_checkpoint_goes_to_every_other_strategy(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(RANKS, train_and_save, "hsdp", tmp_path)
    tensors = read_index(find_checkpoint(tmp_path)).tensors.values()
    assert len({piece[0] for tensor in tensors for piece in tensor.pieces}) == RANKS, (
        "each saves a share of what is alike"
    )
    for name, world_size in (*OTHERS, ("hsdp", RANKS)):
        check_weights(ranks.run(world_size, load_and_train, name, find_checkpoint(tmp_path))[0], name)


@pytest.mark.ranks
def test_every_other_strategys_checkpoint_goes_to_it(ranks: RankPool, tmp_path: Path) -> None:
    for name, world_size in OTHERS:
        ranks.run(world_size, train_and_save, name, tmp_path / name)
        check_weights(ranks.run(RANKS, load_and_train, "hsdp", find_checkpoint(tmp_path / name))[0], name)


@functools.cache
def weights() -> dict[str, Tensor]:
    """Of one process that nothing has interrupted."""
    return run_reference(CASE).weights


def check_weights(half: Any, where: str) -> None:
    for name, weight in weights().items():
        assert (half.weights[name] - weight).abs().max() < WEIGHT_TOLERANCE, (where, name)
