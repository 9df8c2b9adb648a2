"""Lesson 4's hand-written DDP against one process without any framework, and against the books."""

import pytest
import torch
from torch import nn

from lessons import compared, kit
from strategies.ledger.terms import Scenario
from tests.lessons.hand import STEPS, alone, assert_is_the_books, by_hand, place
from tests.ranks import RankPool
from tests.speedrun.runs import launch_of

pytestmark = pytest.mark.ranks


def trained(broken: bool = False) -> compared.Trained:
    """Six steps, two micro-batches each, over the ranks; rank 0's weights must win."""

    class Summed(by_hand("04_ddp").HandDDP):  # type: ignore[misc]
        def wait(self) -> None:
            super().wait()
            for bucket in self.buckets:
                bucket.flat *= place().world_size

    model = kit.build()
    if place().rank:
        for p in model.parameters():
            nn.init.normal_(p)
    cls = Summed if broken else by_hand("04_ddp").HandDDP
    return compared.train_by_hand(cls(model, compared.groups_of(model), bucket_bytes=2**19), place(), STEPS)


def test_it_is_one_process_in_weights_and_the_books_in_bytes(ranks: RankPool) -> None:
    books: Scenario = kit.launched_scenario(launch_of("ddp", 0, 2), accumulation=compared.ACCUMULATION)
    for rank, found in enumerate(ranks.run(2, trained)):
        assert found.away_from(alone()) < 1e-5
        assert_is_the_books(found, books, rank)
        (sent,) = [line for line in found.sent if line.purpose == "payload"]
        assert sent.calls == 4, "several buckets, or there is nothing to overlap"


def test_gradients_that_are_only_summed_are_seen(ranks: RankPool) -> None:
    """The comparison above can fail: without the division by the world size, weights are off by far more."""
    assert ranks.run(2, trained, True)[0].away_from(alone()) > 1e-5


def test_a_parameter_without_a_gradient_is_named(ranks: RankPool) -> None:
    assert all(ranks.run(2, missing_gradient))


def missing_gradient() -> bool:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    ddp = by_hand("04_ddp").HandDDP(model, [])
    ddp.backward(model[0](torch.ones(1, 3)).sum(), last=True)
    with pytest.raises(RuntimeError, match="2 parameters of a bucket got no gradient"):
        ddp.wait()
    return True
