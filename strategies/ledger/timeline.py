"""A step in the order in which it happens: what is held at each point of it, and what is sent when.

From a tracer's log, played back as `replay.py` does. Its time is the number of events, not seconds: a watched step is
slower than others, and not everywhere by the same factor.
"""

from collections import Counter
from typing import Any

from strategies.ledger.tracer import Event

POINTS = 96
"""So many points a step has at most."""


def timeline(events: list[Event], step: int, points: int = POINTS) -> dict[str, Any]:
    """Of one step of a log whose allocations have their categories (after `replay`).

    {"phases": [[name, first point, last point + 1], …],    forward, backward, step
     "held": [{category: bytes}, …],                        at each point, at its fullest moment
     "sent": [[point, collective, purpose, payload bytes], …]}
    """
    ours = [i for i, event in enumerate(events) if event.step == step and event.phase != "prepare"]
    if not ours:
        return {"phases": [], "held": [], "sent": []}
    first, count = ours[0], ours[-1] - ours[0] + 1
    points = min(points, count)
    held: Counter[str] = Counter()
    alive: dict[int, Event] = {}
    fullest: list[dict[str, int]] = [{} for _ in range(points)]
    phases: list[list[Any]] = []
    sent: list[list[Any]] = []
    for i, event in enumerate(events):
        if event.kind == "alloc" and not event.host:
            alive[event.id] = event
            held[event.category] += event.bytes
        elif event.kind == "free" and event.id in alive:
            held[alive.pop(event.id).category] -= event.bytes
        if not 0 <= i - first < count:
            continue
        point = (i - first) * points // count
        if sum(held.values()) >= sum(fullest[point].values()):
            fullest[point] = {name: amount for name, amount in held.items() if amount}
        phase = "backward" if event.phase == "recompute" else event.phase
        if not phases or phases[-1][0] != phase:
            phases.append([phase, point, point])
        phases[-1][2] = point + 1
        if event.kind == "collective":
            sent.append([point, event.tag, event.category or "payload", event.bytes])
    return {"phases": phases, "held": fullest, "sent": sent}
