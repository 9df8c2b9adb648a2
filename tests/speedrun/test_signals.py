"""Signals to real launches: three rows of the table that benchmarks/signals.py writes for every signal, moment and
strategy. Without launches: run/test_ending.py (who handles what), run/test_broken_off.py (validations)."""

from pathlib import Path

import pytest

from benchmarks.signals import Broken, Case, outcome, signalled
from tests.speedrun.runs import read

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.mark.parametrize(
    ("strategy", "case", "ends"),
    [
        ("single", Case("warm-up", "SIGHUP", "launcher"), "preempted, 0 / 0; exit 143"),
        ("fsdp", Case("step", "SIGUSR1", "ranks"), "preempted, 6 / 6"),
        ("zero2", Case("validation", "SIGHUP", "launcher"), "preempted, 6 / 6"),
    ],
)
def test_a_signal_loses_no_more_than_the_step_in_flight(strategy: str, case: Case, ends: str, tmp_path: Path) -> None:
    assert signalled(strategy, case, tmp_path).startswith(ends)
    said = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("shardrun: ")]
    assert len(said) == len(set(said)) and 1 <= len(said) <= 2  # what it means when it comes; how the run ended
    if case.moment == "warm-up":
        assert said == ["shardrun: SIGHUP before the first step: ended, and nothing is lost."]
        return
    assert said[0].startswith(f"shardrun: {case.name}: the run ends after the step that it is in, and saves it.")
    summary = tmp_path / "run/summary.json"
    summary.write_text(summary.read_text().replace("preempted", "running"))
    assert read(tmp_path / "run", "summary.json")["status"] == "running"
    with pytest.raises(Broken, match="running, step 6, saved 6"):  # the benchmark does look
        outcome(case, tmp_path, goes_on=False)
