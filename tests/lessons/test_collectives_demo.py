"""Lesson 3's demo: what it calls is counted in full, and goes by names that torch does not deprecate."""

import warnings

import pytest

from lessons import compared
from strategies.ledger.wire import Meter
from tests.lessons.hand import LESSONS, place
from tests.ranks import RankPool


def counted() -> dict[str, int]:
    """On a rank: collective → bytes of payload, of 120 float32 numbers."""
    demo = compared.load_beside(str(LESSONS / "03_collectives/demo.py"), "demo")
    sent = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for name, call in demo.calls(place(), 120).items():
            with Meter() as meter:
                call()
            sent[name] = sum(line.payload_bytes for line in meter.lines() if line.collective == name)
    return sent


@pytest.mark.ranks
def test_every_collective_is_counted_in_full(ranks: RankPool) -> None:
    whole = dict.fromkeys(("broadcast", "reduce_scatter", "all_gather", "all_reduce"), 4 * 120)
    assert ranks.run(3, counted) == 3 * [{**whole, "all_to_all": 4 * 80}]  # what stays on a rank is not sent
