"""What FSDP gathers at once, whatever the config wraps: the books and the engine go by the same units."""

from typing import Any

import pytest
import torch.distributed as dist

from shardrun.certify.equivalence import Case, compare, run_reference, run_strategy
from speedrun.books.shapes import scenario_of
from strategies import catalogue
from strategies.base import Settings, Strategy
from strategies.forecast.predict import predict_after_forward
from strategies.forecast.traffic import predict_traffic
from strategies.fsdp.books import units
from strategies.ledger.memory import measure
from strategies.ledger.terms import Scenario
from strategies.ledger.wire import Meter
from tests.ranks import RankPool
from tests.strategies.small import batch, forward_backward, place, prepared

WRAPS = ([], ["MLP"], ["Attention"], ["Block", "MLP"], ["Block"])
CASE = Case(accumulation=2)


def engine_of(wrap: list[str], reshard: bool = True) -> dict[str, Any]:
    return {"reshard_after_forward": reshard, "wrap": wrap}


def scenario(wrap: list[str], world_size: int, reshard: bool = True) -> Scenario:
    return scenario_of(CASE.config(), "fsdp", world_size, "bf16", CASE.accumulation, engine_of(wrap, reshard))


def strategy_of(wrap: list[str], precision: str, reshard: bool = True) -> Strategy:
    return catalogue.engine("fsdp", Settings(place(), precision, engine_of(wrap, reshard)))  # type: ignore[arg-type]


def test_the_nearest_wrapped_module_has_a_parameter() -> None:
    parts = units(scenario(["Block", "MLP"], 2))
    assert parts["blocks.0.mlp"] == ["blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight"]
    assert "blocks.0.attention.q.weight" in parts["blocks.0"] and "blocks.0.mlp.up.weight" not in parts["blocks.0"]
    assert "embed.weight" in parts[""]
    assert list(units(scenario([], 2))) == [""]


def watch(wrap: list[str], reshard: bool) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """On a rank: what is held after the last forward pass of the second step, and what that step sent."""
    strategy = prepared(strategy_of(wrap, "bf16", reshard), CASE)
    for step in range(2):
        with Meter() as meter:
            forward_backward(strategy, step, last=False)
            with strategy.micro_batch(last=True):
                loss = strategy.model(*batch(step, dist.get_rank()))
                held = measure(strategy.held())
                strategy.backward(loss)
            strategy.step()
    payload = [line for line in meter.lines() if line.purpose == "payload"]
    return held, {line.collective: (line.calls, line.payload_bytes) for line in payload}


@pytest.mark.ranks
@pytest.mark.parametrize("wrap", WRAPS, ids=lambda wrap: "+".join(wrap) or "NO_WRAP")
def test_books_and_engine_agree_on_the_units(ranks: RankPool, wrap: list[str]) -> None:
    """In bytes, whatever is wrapped. With NO_WRAP the root keeps all parameters gathered till backward."""
    for reshard in (True, False) if wrap == ["MLP"] else (True,):
        expected = scenario(wrap, 3, reshard)
        measured = ranks.run(3, watch, wrap, reshard)
        for rank, (held, sent) in enumerate(measured):
            predicted = predict_after_forward(expected)[rank]
            for category in ("parameters", "gradients", "optimizer states"):
                assert held.get(category, 0) == predicted[category], (wrap, rank, category)
            entries = [entry for entry in predict_traffic(expected, rank) if entry.purpose != "bookkeeping"]
            assert sent == {entry.collective: (entry.calls, entry.payload_bytes) for entry in entries}


def train(wrap: list[str], case: Case) -> Any:
    trace = run_strategy(case, strategy_of(wrap, "fp32"), dist.get_rank(), dist.get_world_size())
    return trace if dist.get_rank() == 0 else None


@pytest.mark.ranks
@pytest.mark.parametrize("wrap", ([], ["Block", "MLP"]), ids=("NO_WRAP", "Block+MLP"))
def test_the_mathematics_is_the_same(ranks: RankPool, wrap: list[str]) -> None:
    case = Case(accumulation=2, rows=16, steps=4)
    verdict = compare(ranks.run(2, train, wrap, case)[0], run_reference(case))
    assert verdict.equal, str(verdict)
