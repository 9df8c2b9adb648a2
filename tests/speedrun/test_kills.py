"""kill −9 of one rank, of all, of the launcher: a few of the moments that benchmarks/kills.py draws by the dozen."""

from pathlib import Path

import pytest

from benchmarks.kills import Broken, drill, figures


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_killed_three_times_is_the_uninterrupted_run_to_the_bit(tmp_path: Path) -> None:
    tally = drill("zero2", kills=3, steps=60, seed=3, folder=tmp_path)
    assert tally.kills == 3 and all(tally.by_target.values())
    lines, _ = figures(tmp_path / "killed_1")
    assert [line[0] for line in lines] == list(range(61))
    summary = tmp_path / "killed_1/run/summary.json"
    summary.write_text(summary.read_text().replace("finished", "running"))
    with pytest.raises(Broken, match="status running"):  # the drill does look
        figures(tmp_path / "killed_1")
