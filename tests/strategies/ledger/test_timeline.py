"""A step in the order in which it happened: its fullest point is the peak, and nothing that was sent is missing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.ledger.replay import replay
from strategies.ledger.timeline import timeline
from strategies.ledger.tracer import Event

PHASES = ("forward", "backward", "step")


def log(steps: list[tuple[str, int]]) -> list[Event]:
    """A log of (what, bytes): alloc, free (the oldest that is alive) and send, in three phases one after another."""
    events, alive = [Event("alloc", 0, 100, "", "prepare", 0, "compute", "parameters")], [0]
    for i, (what, amount) in enumerate(steps, start=1):
        phase = PHASES[(i - 1) * 3 // len(steps)]
        if what == "alloc":
            events.append(Event("alloc", i, amount, "", phase, 0, "compute", "gradients"))
            alive.append(i)
        elif what == "free" and alive:
            events.append(Event("free", alive.pop(0), 0, "", phase, 0, "compute"))
        else:
            events.append(Event("collective", 0, amount, "all_reduce", phase, 0, "compute", "payload"))
    return events


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(("alloc", "free", "send")), st.integers(1, 50)), min_size=3, max_size=80),
    st.integers(1, 40),
)
def test_no_point_hides_the_peak_and_no_message_is_lost(steps: list[tuple[str, int]], points: int) -> None:
    events = log(steps)
    found = timeline(events, 0, points)
    played = replay(events, 0)
    in_passes = max(last for name, _, last in found["phases"] if name != "step") if found["phases"] else 0
    assert len(found["held"]) == min(points, len(steps))
    totals = [sum(point.values()) for point in found["held"]]
    assert max(totals[:in_passes]) >= played.peak_total
    assert sum(amount for *_, amount in found["sent"]) == sum(e.bytes for e in events if e.kind == "collective")
    assert [name for name, *_ in found["phases"]] == list(PHASES)
    assert found["phases"][0][1] == 0 and found["phases"][-1][2] == len(found["held"])
    held = {name: amount for name, amount in played.moments["after step"].items() if amount}
    assert sum(held.values()) <= totals[-1]


def test_a_recomputation_is_part_of_backward_and_an_empty_log_has_no_points() -> None:
    events = [
        Event("alloc", 1, 8, "", "forward", 0, "compute", "activations"),
        Event("alloc", 2, 8, "", "recompute", 0, "compute", "activations"),
        Event("free", 1, 0, "", "backward", 0, "compute"),
    ]
    assert [phase for phase, *_ in timeline(events, 0)["phases"]] == ["forward", "backward"]
    assert timeline([], 0) == {"phases": [], "held": [], "sent": []}
