"""Playing a tracer's log back: what was alive when, at the peak above all, by category and by who allocated it. Of the
device: what lies in host memory beside it is left out.

The log comes from a rank that is simulated (simulate.py) or from a real one (speedrun/books/measured.py).
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from strategies.ledger.tracer import Event

Held = dict[str, int]
"""Bytes by category: strategies.base.CATEGORIES, "activations" (made in a forward pass for the backward pass) and
"other" (temporaries, among them gradients of activations, and the batch)."""

BLOCK_NUMBER = re.compile(r"\.\d+")

PASSES = ("forward", "backward", "recompute")
"""The phases in which the peak is looked for; recompute is a forward pass inside backward, of gradient checkpointing.
"""


@dataclass
class Replay:
    """What a rank did in a step, by its log."""

    events: list[Event]
    """The whole log."""
    moments: dict[str, Held]
    """What was alive "after prepare", "after forward", "after backward", "after step" and at the "peak" of forward and
    backward; after forward and backward of the last micro-batch."""
    largest: list[tuple[str, int]]
    """What the peak is made of: category, module and operator that allocated it, how often; and bytes. Largest first.
    """
    collectives: dict[str, tuple[int, int]]
    """Calls and payload bytes (see strategies/ledger/wire.py) by collective; "… (bookkeeping)" for norms and flags."""

    @property
    def peak(self) -> Held:
        return self.moments["peak"]

    @property
    def peak_total(self) -> int:
        return sum(self.peak.values())


def replay(events: list[Event], step: int) -> Replay:
    """Play the log back. step: the one that the result is about; the log begins in phase prepare."""
    _categorise(events)
    alive: dict[int, Event] = {}
    held: Counter[str] = Counter()
    moments: dict[str, Held] = {}
    at_peak: list[Event] = []
    total = peak = 0
    phase = "prepare"
    end = Event("compute", 0, 0, "", "end", step + 1, "")
    for event in [*events, end]:
        if event.phase not in (phase, "recompute"):
            if phase == "prepare" or event.step >= step:
                moments[f"after {phase}"] = dict(held)
            phase = event.phase
        if event.kind == "alloc" and not event.host:
            alive[event.id] = event
            held[event.category] += event.bytes
            total += event.bytes
        elif event.kind == "free" and event.id in alive:
            held[alive.pop(event.id).category] -= event.bytes
            total -= event.bytes
        if event.step == step and event.phase in PASSES and total > peak:
            peak, moments["peak"], at_peak = total, dict(held), list(alive.values())
    return Replay(events, moments, _largest(at_peak), _collectives(events, step))


def _categorise(events: list[Event]) -> None:
    """What no one has named: made in a forward pass and alive in the backward pass it was made for, or else passing."""
    ends = {event.id: event.phase for event in events if event.kind == "free"}
    for event in events:
        if event.kind == "alloc" and not event.category:
            end = ends.get(event.id)
            saved = (event.phase == "forward" and end in ("backward", "recompute")) or (
                event.phase == "recompute" and end == "backward"
            )
            event.category = "activations" if saved else "other"


def _largest(alive: Iterable[Event]) -> list[tuple[str, int]]:
    bytes: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in alive:
        who = f"{event.category}: {BLOCK_NUMBER.sub('.*', event.tag)}"
        bytes[who] += event.bytes
        times[who] += 1
    return [(f"{who} ×{times[who]}" if times[who] > 1 else who, size) for who, size in bytes.most_common()]


def _collectives(events: list[Event], step: int) -> dict[str, tuple[int, int]]:
    result: dict[str, tuple[int, int]] = {}
    for event in events:
        if event.kind == "collective" and event.step == step:
            name = event.tag if event.category == "payload" else f"{event.tag} (bookkeeping)"
            calls, bytes = result.get(name, (0, 0))
            result[name] = (calls + 1, bytes + event.bytes)
    return result
