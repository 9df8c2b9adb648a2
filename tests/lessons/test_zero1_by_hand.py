"""Lesson 5's hand-written ZeRO-1 against one process without any framework, and against the books."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lessons import kit
from strategies.ledger.predict import predict_memory
from strategies.ledger.traffic import predict_traffic
from strategies.matrices import Place
from tests.ranks import RankPool
from tests.speedrun.runs import launch_of

LESSON = Path(__file__).parent.parent.parent / "lessons" / "05_zero1"
STEPS = 6

pytestmark = pytest.mark.ranks


def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", LESSON / "demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_rank(broken: str = "") -> dict[str, Any]:
    lesson = demo()
    by_hand = lesson.load("by_hand")
    if broken == "summed":

        class Summed(by_hand.HandZero1):
            def reduce(self) -> None:
                super().reduce()
                for s in self.slices:
                    s.gradient = [piece * self.world_size for piece in s.gradient]

        by_hand.HandZero1 = Summed
    lesson.load = lambda name: by_hand
    place = Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    result: dict[str, Any] = lesson.train_by_hand(place, STEPS)
    return result


def worst(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max((a["weights"][name] - b["weights"][name]).abs().max().item() for name in a["weights"])


def test_it_is_one_process_in_weights_and_the_books_in_bytes(ranks: RankPool) -> None:
    lesson = demo()
    alone = lesson.train_alone(torch.device("cpu"), STEPS)
    books = kit.books_of(launch_of("zero1", 0, 2), accumulation=lesson.ACCUMULATION)
    memory = predict_memory(books)
    for rank, found in enumerate(ranks.run(2, on_rank)):
        assert worst(found, alone) < 1e-5
        predicted = memory[rank]["after backward"]
        assert found["held"] == {category: predicted[category] for category in found["held"]}
        booked = {e.collective: e.payload_bytes for e in predict_traffic(books, rank) if e.purpose != "bookkeeping"}
        assert lesson.sent_by(found) == booked


def test_gradients_that_are_only_summed_are_seen(ranks: RankPool) -> None:
    """The comparison above can fail: without the division by the world size, weights are off by far more."""
    alone = demo().train_alone(torch.device("cpu"), STEPS)
    assert worst(ranks.run(2, on_rank, "summed")[0], alone) > 1e-5
