"""Lesson 8's hand-written FSDP against one process without any framework, and against the books."""

from dataclasses import replace

import pytest
import torch

from lessons import compared, kit
from strategies.base import Precision, Settings
from strategies.catalogue import engine as make
from strategies.ledger.terms import Scenario
from tests.lessons.hand import STEPS, alone, assert_is_the_books, by_hand, place
from tests.ranks import RankPool
from tests.speedrun.runs import launch_of

pytestmark = pytest.mark.ranks


def on_rank(reshard: bool = True, precision: Precision = "fp32", broken: bool = False) -> compared.Trained:
    class Summed(by_hand("08_fsdp").HandFSDP):  # type: ignore[misc]
        def step(self) -> None:
            for rows in self.rows.values():
                rows.mine.grad *= self.world_size
            super().step()

    cls = Summed if broken else by_hand("08_fsdp").HandFSDP
    model = kit.build()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    clip = kit.CONFIG.optimizer.clip
    fsdp = cls(model, list(model.blocks), compared.groups_of(model), clip, reshard, dtype)
    return compared.train_by_hand(fsdp, place(), STEPS)


def beside_torchs() -> tuple[compared.Trained, compared.Trained]:
    """By hand and by fully_shard, both in bf16."""
    strategy = make("fsdp", Settings(place(), "bf16", launch_of("fsdp").engine))
    kit.prepare(strategy, accumulation=compared.ACCUMULATION)
    return on_rank(precision="bf16"), compared.train_strategy(strategy, STEPS)


def scenario_of(reshard: bool, precision: Precision) -> Scenario:
    launch = launch_of("fsdp", 0, 2, precision)
    launch = replace(launch, engine={**launch.engine, "reshard_after_forward": reshard})
    return kit.launched_scenario(launch, accumulation=compared.ACCUMULATION)


@pytest.mark.parametrize("reshard", [True, False])
def test_it_is_one_process_in_weights_and_the_books_in_bytes(ranks: RankPool, reshard: bool) -> None:
    for rank, found in enumerate(ranks.run(2, on_rank, reshard)):
        assert found.away_from(alone()) < 1e-5
        assert_is_the_books(found, scenario_of(reshard, "fp32"), rank)


def test_in_bf16_it_is_torchs_and_the_books_in_bytes(ranks: RankPool) -> None:
    """Weights up to bf16's rounding; collectives call for call."""
    for rank, (found, torchs) in enumerate(ranks.run(2, beside_torchs)):
        assert found.away_from(torchs) < 1e-3 < found.away_from(alone())
        assert found.sent == torchs.sent
        assert_is_the_books(found, scenario_of(True, "bf16"), rank)


def test_gradients_that_are_only_summed_are_seen(ranks: RankPool) -> None:
    """The comparison above can fail."""
    assert ranks.run(2, on_rank, True, "fp32", True)[0].away_from(alone()) > 1e-5
