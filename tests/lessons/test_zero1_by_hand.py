"""Lesson 5's hand-written ZeRO-1 against one process without any framework, and against the books."""

import pytest

from lessons import compared, kit
from tests.lessons.hand import STEPS, alone, assert_is_the_books, by_hand, place
from tests.ranks import RankPool
from tests.speedrun.runs import launch_of

pytestmark = pytest.mark.ranks


def on_rank(broken: bool = False) -> compared.Trained:
    class Summed(by_hand("05_zero1").HandZero1):  # type: ignore[misc]
        def wait(self) -> None:
            super().wait()
            for part in self.parts():
                part.gradient.mul_(self.world_size)

    cls = Summed if broken else by_hand("05_zero1").HandZero1
    model = kit.build()
    return compared.train_by_hand(cls(model, compared.groups_of(model)), place(), STEPS)


def test_it_is_one_process_in_weights_and_the_books_in_bytes(ranks: RankPool) -> None:
    reference = alone()
    books = kit.launched_scenario(launch_of("zero1", 0, 2), accumulation=compared.ACCUMULATION)
    for rank, found in enumerate(ranks.run(2, on_rank)):
        assert found.away_from(reference) < 1e-5
        assert_is_the_books(found, books, rank)


def test_gradients_that_are_only_summed_are_seen(ranks: RankPool) -> None:
    """The comparison above can fail: without the division by the world size, weights are off by far more."""
    assert ranks.run(2, on_rank, True)[0].away_from(alone()) > 1e-5
