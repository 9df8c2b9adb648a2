"""A presentation that really ran: lesson 4, its own text and demo.py, and a few steps of a small model on two ranks."""

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import shardrun.present
from shardrun.__main__ import main
from shardrun.lesson.course import Lesson, Live, find_lesson

SMALL = (
    *("tiny", "--steps", "9", "--eval-every", "0", "--untimed-steps", "0", "--data.eval-tokens", "64"),
    *("--data.global-batch", "4", "--data.sequence-length", "32", "--model.width", "32", "--model.layers", "1"),
)


@dataclass(frozen=True)
class Recorded:
    """folder: of the recording; printed: what was seen where the output is no terminal."""

    folder: Path
    printed: str


def small(number: int) -> Lesson:
    return replace(find_lesson(number), live=Live("cpu/ddp", "cpu/ddp", SMALL))


def show(*arguments: str) -> tuple[int, str, str]:
    """`shardrun present …` in this process: its exit status, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(["present", *arguments])
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True, scope="session")
def no_signal_handlers() -> Iterator[None]:
    """They are the process's, which here is pytest's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shardrun.present, "_end_ranks_when_killed", lambda: None)
        yield


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Recorded:
    here = tmp_path_factory.mktemp("present")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(shardrun.present, "find_lesson", small)
        patch.setattr(sys, "stdin", io.StringIO())
        patch.setattr(sys, "executable", warm_python)
        patch.setenv("COLUMNS", "100")
        status, printed, errors = show("4")
    assert status == 0, printed + errors
    (folder,) = (here / "runs").glob("present-04_ddp-*")
    return Recorded(folder, printed)
