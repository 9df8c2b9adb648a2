"""Keys, and the ways out: q, Ctrl-C and being told to end leave no process, and the terminal as it was."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.shardrun.present.conftest import Recorded

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


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.1)


def test_being_interrupted_while_ranks_train_leaves_none(tmp_path: Path) -> None:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with present("1", folder=tmp_path, **streams) as process:
        wait_for(lambda: any(tmp_path.glob("runs/present-*/run/metrics.jsonl")), 120)
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


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are Unix's")
def test_keys_bring_the_next_part_the_one_before_and_the_end(recorded: Recorded, tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    before = termios.tcgetattr(theirs)
    os.set_blocking(ours, False)
    seen = b""

    def shows(words: str) -> bool:
        nonlocal seen
        with contextlib.suppress(BlockingIOError):
            seen += os.read(ours, 1 << 20)
        return words.encode() in seen

    def press(key: bytes) -> None:
        nonlocal seen
        seen = b""
        os.write(ours, key)

    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with present("4", "--replay", str(recorded.folder), folder=tmp_path, **streams) as process:
        wait_for(lambda: shows("You can write distributed data parallelism"), 30)
        time.sleep(1)
        assert not shows("Every rank holds everything"), "it waits for a key"
        press(b" ")
        wait_for(lambda: shows("Every rank holds everything"), 10)
        press(b"\x1b[D")
        wait_for(lambda: shows("You can write distributed data parallelism"), 10)
        for _ in range(40):
            press(b"n")
            with contextlib.suppress(AssertionError):
                wait_for(lambda: shows("Question 1 of 5") or shows("q: end"), 10)
            if shows("Question 1 of 5"):
                break
        time.sleep(1)
        assert shows("synchronise the ranks") and not shows("The step is local"), "the answer waits for a key"
        press(b"n")
        wait_for(lambda: shows("The step is local"), 10)
        press(b"q")
        wait_for(lambda: process.poll() is not None, 20)
        wait_for(lambda: shows("Page: "), 5)
    assert process.returncode == 0
    after = termios.tcgetattr(theirs)
    os.close(ours)
    os.close(theirs)
    assert after == before, "what is typed is seen again"
