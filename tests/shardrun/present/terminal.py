"""A presentation in a pseudo-terminal of a given size: what is on its screen, keys to press, and its end."""

import contextlib
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]


def wait_for(condition: Callable[[], bool], seconds: float, what: str = "what was waited for") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.05)


class Driven:
    """`shardrun present …` on a terminal of so many columns and lines."""

    def __init__(self, process: subprocess.Popen[bytes], master: int):
        self.process, self._master, self._seen = process, master, b""

    def read(self) -> str:
        """All that it has written so far, without colours."""
        with contextlib.suppress(BlockingIOError, OSError):
            while part := os.read(self._master, 1 << 20):
                self._seen += part
        return re.sub(r"\x1b\[[\d;]*m|\x1b\[\?\d+[hl]", "", self._seen.decode(errors="ignore"))

    @property
    def screen(self) -> list[str]:
        """The lines of the last frame that is whole."""
        frames = self.read().split("\x1b[H")
        return [line.rstrip("\r") for line in (frames[-1] if len(frames) > 1 else "").split("\n")]

    def shows(self, words: str) -> bool:
        return any(words in line for line in self.screen)

    def expect(self, words: str, seconds: float = 60.0) -> None:
        with_screen = lambda: f"{words!r}; on the screen is\n" + "\n".join(self.screen)  # noqa: E731
        deadline = time.monotonic() + seconds
        while not self.shows(words):
            assert time.monotonic() < deadline and self.process.poll() is None, with_screen()
            time.sleep(0.05)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def end(self, seconds: float = 60.0) -> str:
        """Wait for its end; everything that it has written."""
        wait_for(lambda: (self.read(), self.process.poll() is not None)[1], seconds, "the end")
        return self.read()


@contextlib.contextmanager
def driven(*arguments: str, folder: Path, width: int, height: int, **variables: str) -> Iterator[Driven]:
    """Nothing that it has started may be left at the end."""
    import fcntl
    import pty
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    before = termios.tcgetattr(slave)
    os.set_blocking(master, False)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **variables}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "shardrun", "present", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, stdin=slave, stdout=slave, stderr=slave
    )
    started: set[psutil.Process] = set()
    try:
        terminal = Driven(process, master)
        with contextlib.suppress(psutil.NoSuchProcess):
            started |= set(psutil.Process(process.pid).children(recursive=True))
        yield terminal
        with contextlib.suppress(psutil.NoSuchProcess):
            started |= set(psutil.Process(process.pid).children(recursive=True))
        terminal.end()
        _, alive = psutil.wait_procs(list(started), timeout=5)
        assert not alive, "a process is left"
        assert termios.tcgetattr(slave) == before, "what is typed is seen again"
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for left in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                left.kill()
        process.wait()
        os.close(master)
        os.close(slave)
