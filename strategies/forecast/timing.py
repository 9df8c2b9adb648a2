"""From bytes to seconds: how long a step's collectives take over a link, and how much of it no computation hides.

Plain Python, no torch. A model of two numbers per link, α + bytes/β, as in Hockney (1994): it ranks strategies and
shows orders of magnitude.
"""

from collections.abc import Sequence

from strategies import catalogue
from strategies.ledger.hardware import LATENCY
from strategies.ledger.terms import Entry


def communication(
    entries: Sequence[Entry], strategy: str, compute: float, accumulation: int, link: float
) -> tuple[float, float]:
    """Seconds of all collectives of a step, and of what no computation hides.

    compute: seconds of all forward and backward passes; link: bytes per second each way. A collective takes LATENCY per
    call and its ring bytes over the link. What computation hides, a strategy's books say; Muon's exchange and
    bookkeeping lie in the optimizer step, and so are exposed.
    """
    seconds: dict[str, float] = {}
    for entry in entries:
        time = entry.calls * LATENCY + entry.ring_bytes / link
        seconds[entry.purpose] = seconds.get(entry.purpose, 0.0) + time
    hidden_by = catalogue.books(strategy).hidden_by(compute, accumulation)
    exposed = sum(max(0.0, time - hidden_by.get(purpose, 0.0)) for purpose, time in seconds.items())
    return sum(seconds.values()), exposed
