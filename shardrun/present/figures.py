"""The figures of a presentation, for the terminal and the page: events in, numbers and bars out. Bytes are integers."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from shardrun.colours import COLOURS
from shardrun.present.record import Event


@dataclass(frozen=True)
class Category:
    """What bytes are held for; `letter` fills its part of a bar in the terminal, `colour` in the page too."""

    name: str
    letter: str

    @property
    def colour(self) -> str:
        return COLOURS[self.name]


SHOWN = (
    Category("parameters", "P"),
    Category("master parameters", "M"),
    Category("gradients", "G"),
    Category("optimizer states", "O"),
    Category("communication buffers", "B"),
    Category("activations", "A"),
    Category("other", "x"),
)
"""Those of the books, as strategies/ledger/terms.py and speedrun/books/measured.py name them, as bars stack them."""

TELLING_FIRST = ("after backward", "after forward", "peak", "after step", "after prepare")
"""Those of the books, the most telling first: where there is room for some only, it is for these."""

IN_TIME = ("after prepare", "after forward", "peak", "after backward", "after step")
"""The same in the order in which they come."""


@dataclass
class Training:
    """What is known of a training run so far."""

    about: Event = field(default_factory=dict)
    steps: list[Event] = field(default_factory=list)
    books: Event = field(default_factory=dict)
    """The newest; empty before the first."""
    counted: set[int] = field(default_factory=set)
    """The steps whose books were kept."""
    ddp: dict[str, dict[str, int]] = field(default_factory=dict)
    """Moment → category → bytes that a rank would hold under DDP, predicted; empty where that is no comparison."""

    def take(self, event: Event) -> None:
        if event["kind"] == "run":
            self.about = event
        elif event["kind"] == "step":
            self.steps.append(event)
        elif event["kind"] == "books":
            self.books = event
            self.counted.add(event["step"])
        elif event["kind"] == "whole":
            self.ddp = event["memory"]

    @property
    def ranks(self) -> list[dict[str, Any]]:
        return self.books.get("ranks", [])

    @property
    def timeline(self) -> Event:
        """Rank 0's step in the order in which it happened (strategies/ledger/timeline.py); empty without books."""
        return self.ranks[0].get("timeline", {}) if self.ranks else {}

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss) of every step that has one."""
        return [(line["step"], line["train_loss"]) for line in self.steps if line.get("train_loss") is not None]

    @property
    def step_ms(self) -> float | None:
        """The median of the steps whose books were not kept."""
        times = [
            line["data_time_ms"] + line["compute_time_ms"]
            for line in self.steps
            if "compute_time_ms" in line and line["step"] not in self.counted
        ]
        return statistics.median(times) if times else None


@dataclass(frozen=True)
class Bar:
    """What a rank held at a moment: bytes by category, measured; or, without a rank, what DDP would, predicted."""

    rank: int | None
    moment: str
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def name(self) -> str:
        return "DDP" if self.rank is None else f"rank {self.rank}"


def bars(training: Training, moments: tuple[str, ...] = IN_TIME) -> list[Bar]:
    """Moment by moment: what DDP would hold, where that is a comparison, then a bar for every rank."""
    found = []
    for moment in moments:
        ours = [
            Bar(rank["rank"], moment, {name: line["measured"] for name, line in rank["memory"][moment].items()})
            for rank in training.ranks
            if moment in rank["memory"]
        ]
        if ours and moment in training.ddp:
            found.append(Bar(None, moment, training.ddp[moment]))
        found += ours
    return found


def sent_by_kind(timeline: Event) -> dict[str, list[tuple[int, int]]]:
    """Collective, bookkeeping apart → (point, payload bytes) of each call in the course of the step."""
    found: dict[str, list[tuple[int, int]]] = {}
    for point, name, purpose, amount in timeline["sent"]:
        kind = f"{name} (norm, flags)" if purpose == "bookkeeping" else name
        found.setdefault(kind, []).append((point, amount))
    return found
