"""kill −9 of the launcher and every rank in the middle of a save: one of the moments that benchmarks/kills.py draws by
the dozen. Its table has every strategy, and kills of one rank and of the launcher alone, which test_launched.py,
test_resume.py and test_ending.py have too."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kills
from benchmarks.kills import Broken, drill, figures
from tests.speedrun.runs import read


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_that_is_killed_as_a_whole_is_the_uninterrupted_run_to_the_bit(
    tmp_path: Path, warm_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three launches. Only the second, which is killed, is of real processes from their start."""
    launches, start = [], kills.start

    def started(strategy: str, out: Path, steps: int) -> subprocess.Popen[str]:
        launches.append(out.name)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", sys.executable if len(launches) == 2 else warm_python)
            return start(strategy, out, steps)

    monkeypatch.setattr(kills, "start", started)
    monkeypatch.setattr(kills, "TARGETS", ("all",))
    tally = drill("zero2", kills=1, steps=30, seed=9, folder=tmp_path)
    assert launches == ["whole", "killed_1", "killed_1"]
    assert (tally.kills, tally.by_target) == (1, {"all": 1})
    assert read(tmp_path / "killed_1/run", "config.json")["resumed_at"] >= 2
    lines, _ = figures(tmp_path / "killed_1")
    assert [line[0] for line in lines] == list(range(31))
    summary = tmp_path / "killed_1/run/summary.json"
    summary.write_text(summary.read_text().replace("finished", "running"))
    with pytest.raises(Broken, match="status running"):  # the drill does look
        figures(tmp_path / "killed_1")
