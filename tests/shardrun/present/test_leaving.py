"""Ctrl-C and being told to end leave no process (test_driven.py: keys, and q)."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.shardrun.present.terminal import wait_for

ROOT = Path(__file__).parents[3]

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@contextlib.contextmanager
def present(*arguments: str, folder: Path, **streams: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "shardrun", "present", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, preexec_fn=_heed_interrupts, **streams
    )
    try:
        yield process
    finally:
        for left in [*_children(process.pid), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def _heed_interrupts() -> None:
    """What runs in a shell's background ignores Ctrl-C, and so does all that it starts: these tests too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def test_being_interrupted_while_ranks_train_leaves_none(tmp_path: Path) -> None:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with present("1", folder=tmp_path, **streams) as process:
        wait_for(lambda: any(tmp_path.glob("runs/present-*/run/metrics.jsonl")), 240)
        ranks = _children(process.pid)
        assert len(ranks) >= 2, "the launcher and a rank"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 130
        and errors.count(b"\n") == 1
        and b"shardrun: ending what the presentation has started" in errors
    )
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
    (folder,) = tmp_path.glob("runs/present-*")
    with present("1", "--replay", str(folder), folder=tmp_path, **streams) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and b"breaks off after line" in errors


def test_being_told_to_end_while_demo_py_runs_leaves_nothing(tmp_path: Path) -> None:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with present("4", folder=tmp_path, **streams) as process:
        wait_for(lambda: len(_children(process.pid)) >= 3, 60)
        started = _children(process.pid)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and not errors
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
