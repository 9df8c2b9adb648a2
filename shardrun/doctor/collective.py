"""Two ranks, one sum: whether processes of this machine can work together at all, within a time limit."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shardrun.doctor.report import Line

RANK = (sys.executable, "-m", "shardrun.doctor.collective_rank")


def two_ranks(backend: str, timeout: float, rank_command: tuple[str, ...] = RANK) -> Iterator[Line]:
    """Start two ranks that sum 1 MiB and wait for them; all of them have ended afterwards.

    backend: 'gloo' on CPU, or 'nccl' on two GPUs. rank_command gets BACKEND RANK WORLD_SIZE PORT as arguments.
    """
    name = f"two ranks, {backend}"
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(2)]
        port = _free_port()
        processes = []
        try:
            for rank, output in enumerate(outputs):
                with open(output, "w", encoding="utf-8") as file:
                    command = [*rank_command, backend, str(rank), "2", str(port)]
                    processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
            ended = _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        said = [output.read_text(encoding="utf-8", errors="replace").splitlines() for output in outputs]
    for rank, process in enumerate(processes):
        if process.returncode > 0:
            yield Line(name, "failure", f"rank {rank} ended with an error: {_error(said[rank])}", _remedy(backend))
            return
    if not ended:
        where = "; ".join(f"rank {rank} while {_reached(lines)}" for rank, lines in enumerate(said))
        yield Line(name, "failure", f"they hung, and were ended after {timeout:.0f} s: {where}", _remedy(backend))
        return
    yield Line(name, "ok", f"1 MiB summed in {said[0][-1].split()[-1]} ms")


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> bool:
    """Until all have ended, one has failed, or the time is up; whether all have ended well."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        states = [process.poll() for process in processes]
        if all(state == 0 for state in states):
            return True
        if any(state for state in states):
            return False
        time.sleep(0.05)
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _reached(lines: list[str]) -> str:
    """What a rank said last that it was about to do."""
    steps = [line for line in lines if line.split(" ")[0] in ("loading", "meeting", "summing")]
    return steps[-1] if steps else "starting"


def _error(lines: list[str]) -> str:
    """The last line of a traceback, or the last line at all."""
    return next((line for line in reversed(lines) if line.strip()), "without a message")


def _remedy(backend: str) -> str:
    """What most often helps, most likely first."""
    if backend == "nccl":
        return "NCCL_P2P_DISABLE=1 NCCL_DEBUG=INFO python -m shardrun doctor  # does it work without peer-to-peer?"
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return f"GLOO_SOCKET_IFNAME={loopback} python -m shardrun doctor  # does it work on the loopback device?"
