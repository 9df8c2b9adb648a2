"""What the tests of the hand-written strategies (lessons 5 to 8) share."""

import functools
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from lessons import compared
from strategies.forecast.predict import predict_memory
from strategies.forecast.traffic import predict_traffic
from strategies.ledger.terms import MODEL_STATES, Scenario
from strategies.mesh import Place

LESSONS = Path(__file__).parent.parent.parent / "lessons"
STEPS = 6


def by_hand(lesson: str) -> ModuleType:
    """The by_hand.py of a lesson's folder."""
    return compared.load_beside(str(LESSONS / lesson / "demo.py"), "by_hand")


def place() -> Place:
    """Of this rank in the pool's world."""
    return Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


@functools.cache
def alone() -> compared.Trained:
    """One process without any framework."""
    return compared.train_alone(torch.device("cpu"), STEPS)


def assert_is_the_books(found: compared.Trained, books: Scenario, rank: int) -> None:
    """Bytes of model states held before the update, by category, and bytes sent in a step, by collective."""
    predicted = predict_memory(books)[rank]["after backward"]
    held = {category: bytes for category, bytes in found.held.items() if category in MODEL_STATES}
    assert held == {category: predicted[category] for category in held}
    entries = [entry for entry in predict_traffic(books, rank) if entry.purpose != "bookkeeping"]
    sent = {s.collective: s.payload_bytes for s in found.sent if s.purpose == "payload"}
    assert sent == {entry.collective: entry.payload_bytes for entry in entries}
