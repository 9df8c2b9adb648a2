"""A part's processes: started in a session of their own, ended as a whole when they end, hang, or nobody waits."""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

MARK = "SHARDRUN_GPU_PART"
"""Variable by which all processes of a part are known. A launcher puts its ranks into sessions of their own, where no
signal to our own group would reach them; what it cannot do is to start them without our environment."""


def run(command: list[str], folder: Path, log: Path, seconds: float, environment: Mapping[str, str]) -> int | None:
    """Run a command in `folder`; what it prints goes to `log`. Returns its exit status, None where the time was up.

    Nothing that it started is left, not after KeyboardInterrupt either.
    """
    mark = uuid.uuid4().hex
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_all(process.pid, mark)
            process.wait()


def end_all(group: int, mark: str) -> None:
    """Kill a process group and, where there is /proc, whatever carries the mark."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + 10  # a process that waits inside a driver may not end before that
    while (left := marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """The processes that carry it and are alive."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def last_lines(log: Path, count: int = 12) -> list[str]:
    """The end of what a part printed."""
    if not log.exists():
        return []
    return [line.rstrip()[-300:] for line in log.read_text(encoding="utf-8", errors="replace").splitlines()][-count:]
