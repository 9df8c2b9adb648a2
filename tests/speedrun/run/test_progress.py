"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

import subprocess
import sys

import pytest

from speedrun.run.progress import Progress, describe

STEP = {"step": 3, "train_loss": 4.25, "train_time_ms": 1234.4, "step_avg_ms": 411.47}
VALIDATED = {**STEP, "val_loss": 3.5, "val_bits_per_byte": 5.05}


def test_a_step_is_a_line_as_in_the_public_speedrun_logs() -> None:
    assert describe(STEP, 20) == "step:3/20 train_loss:4.2500 train_time:1234ms step_avg:411.47ms"
    assert describe({**STEP, "counted": True}, 20).endswith("step_avg:411.47ms (counted for the books, not timed)")
    assert "step_avg" not in describe({**STEP, "step_avg_ms": None}, 20)  # of a run of one step, which is counted
    assert describe({"step": 0, "val_loss": 5.0, "val_bits_per_byte": None, "train_time_ms": 0.0}, 20) == (
        "step:0/20 val_loss:5.0000 train_time:0ms"
    )
    assert " val_loss:3.5000 bits_per_byte:5.0500 " in describe(VALIDATED, 20)


def test_plain_lines_come_at_every_twentieth_of_the_run_and_at_validations(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("auto", 100)  # no terminal under pytest
    for step in range(1, 13):
        progress.step({**(VALIDATED if step == 7 else STEP), "step": step})
    progress.say("done")
    progress.close()
    assert [line.split("/")[0] for line in capsys.readouterr().out.splitlines()] == [
        *("step:5", "step:7", "step:10", "done"),
    ]


def test_none_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("none", 3)
    progress.step(VALIDATED)
    progress.say("done")
    progress.close()
    assert capsys.readouterr().out == ""


def test_the_live_display_keeps_validations_whole_on_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("live", 3)
    progress.step(STEP)
    progress.step(VALIDATED)
    progress.say("[bold] is no markup here")
    progress.close()
    shown = capsys.readouterr().out
    assert describe(VALIDATED, 3) in shown and "[bold] is no markup here" in shown
    assert describe(STEP, 3) not in shown


def test_reading_what_a_run_has_left_needs_no_torch() -> None:
    """`shardrun compare` and `ablate` start in a moment."""
    script = "import sys, speedrun.run.progress, speedrun.run.record; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
