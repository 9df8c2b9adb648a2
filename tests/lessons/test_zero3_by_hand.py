"""Lesson 7's hand-written ZeRO-3 against one process without any framework, and against the books."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lessons import compared, kit
from speedrun.optim.rules import AdamW
from tests.lessons.hand import STEPS, alone, assert_is_the_books, by_hand, place
from tests.ranks import RankPool
from tests.speedrun.runs import launch_of

LET_GO = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}}
KEEP = {"zero_optimization": {"stage": 3}}
"""DeepSpeed's default for a model below 1e9 parameters."""

pytestmark = pytest.mark.ranks


def on_rank(keep: bool, prefetch: bool = True, broken: bool = False) -> compared.Trained:
    class NeverPublished(by_hand("07_zero3").HandZero3):  # type: ignore[misc]
        def update(self) -> None:
            before = [cut.mine.clone() for cut in self.cuts.values()]
            super().update()
            for cut, old in zip(self.cuts.values(), before, strict=True):
                cut.mine.copy_(old)

    cls = NeverPublished if broken else by_hand("07_zero3").HandZero3
    model = kit.build()
    zero = cls(model, compared.groups_of(model), keep, prefetch)
    return compared.train_by_hand(zero, place(), STEPS)


def most_gathered(**options: Any) -> int:
    """Parameters that are whole at most at the same time, in elements, over two steps of five layers."""
    model = nn.Sequential(*(nn.Linear(9, 9, bias=False) for _ in range(5)))
    options_of_adamw = {"rule": AdamW(), "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    groups = [{"params": list(model.parameters()), **options_of_adamw}]
    zero = by_hand("07_zero3").HandZero3(model, groups, **options)
    found: list[int] = []

    def count() -> int:
        return sum(p.numel() for p, cut in zero.cuts.items() if cut.gathered)

    zero.observe = lambda phase, module: found.append(count())
    for _ in range(2):
        zero.backward(model(torch.ones(1, 9)).sum(), last=True)
        assert count() == 0
        compared.finish_step(zero)
    return max(found)


@pytest.mark.parametrize(("keep", "engine"), [(False, LET_GO), (True, KEEP)])
def test_it_is_one_process_in_weights_and_the_books_in_bytes(
    ranks: RankPool, keep: bool, engine: dict[str, Any]
) -> None:
    reference = alone()
    books = replace(kit.launched_scenario(launch_of("zero3", 0, 2), accumulation=compared.ACCUMULATION), engine=engine)
    for rank, found in enumerate(ranks.run(2, on_rank, keep)):
        assert found.away_from(reference) < 1e-5
        assert_is_the_books(found, books, rank)


def test_weights_that_do_not_reach_the_model_are_seen(ranks: RankPool) -> None:
    """The comparison above can fail."""
    assert ranks.run(2, on_rank, False, True, True)[0].away_from(alone()) > 1e-5


def test_parameters_are_whole_for_a_moment_only(ranks: RankPool) -> None:
    """81 elements are odd, so that each cut has padding; it belongs to no parameter."""
    assert ranks.run(2, most_gathered_plain) == [81, 81]
    assert ranks.run(2, most_gathered) == [2 * 81, 2 * 81]
    assert ranks.run(2, most_gathered_kept) == [5 * 81, 5 * 81]


def most_gathered_plain() -> int:
    return most_gathered(prefetch=False)


def most_gathered_kept() -> int:
    return most_gathered(keep=True)
