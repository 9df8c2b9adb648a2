"""Seconds of communication against a queue of messages, played through one by one."""

import pytest

from strategies.forecast.timing import communication
from strategies.ledger.hardware import LATENCY
from strategies.ledger.terms import Entry

LINK = 1e9


def gradients(seconds: float, calls: int = 0) -> Entry:
    return Entry("all_reduce", "gradients", calls, 0, 0, seconds * LINK)


def played(backward: float, message: float, buckets: int) -> float:
    """What is left of equal messages after backward, each sent as soon as its gradients are there and the link free."""
    free = 0.0
    for i in range(1, buckets + 1):
        free = max(free, i * backward / buckets) + message / buckets
    return free - backward


@pytest.mark.parametrize("message", [0.5, 2.0, 5.0])
def test_ddp_hides_gradients_behind_the_last_backward_pass(message: float) -> None:
    compute, accumulation = 12.0, 4  # backward takes two thirds, a quarter of it is the last micro-batch's: 2 s
    total, exposed = communication([gradients(message)], "ddp", compute, accumulation, LINK)
    assert total == pytest.approx(message)
    assert exposed == pytest.approx(played(2.0, message, 10_000), abs=1e-3)


def test_zero1_hides_nothing_and_every_call_has_a_latency() -> None:
    entries = [gradients(1.0, calls=3), Entry("all_gather", "parameters", 2, 0, 0, 0.5 * LINK)]
    total, exposed = communication(entries, "zero1", 12.0, 1, LINK)
    assert total == exposed == pytest.approx(1.5 + 5 * LATENCY)


def test_zero3_gathers_behind_all_of_the_compute() -> None:
    entries = [gradients(7.0), Entry("all_gather", "parameters", 0, 0, 0, 13.0 * LINK)]
    assert communication(entries, "zero3", 9.0, 4, LINK) == pytest.approx((20.0, 7.0 - 6.0 + 13.0 - 9.0))
