"""Two ranks, one sum: whether processes of this machine can work together at all, within a time limit."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shardrun.doctor.report import Finding

RANK = (sys.executable, "-m", "shardrun.doctor.collective_rank")


def two_ranks(backend: str, timeout: float, rank_command: tuple[str, ...] = RANK) -> Iterator[Finding]:
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
            states = _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        said = [output.read_text(encoding="utf-8", errors="replace").splitlines() for output in outputs]
    if any(states):
        errors = (f"rank {i} {_ending(state, said[i])}" for i, state in enumerate(states) if state)
        yield Finding(name, "failure", "; ".join(errors), _remedy(backend))
    elif None in states:
        where = "; ".join(f"rank {i} while {_reached(lines)}" for i, lines in enumerate(said))
        yield Finding(name, "failure", f"they hung, and were ended after {timeout:.0f} s: {where}", _remedy(backend))
    else:
        milliseconds = next(line.split()[1] for line in said[0] if line.startswith("done "))
        yield Finding(name, "ok", f"1 MiB summed in {milliseconds} ms")


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> list[int | None]:
    """Until all have ended, one has failed, or the time is up. Returns each one's status, None while it runs."""
    deadline = time.monotonic() + timeout
    while True:
        states = [process.poll() for process in processes]
        if None not in states or any(states) or time.monotonic() > deadline:
            return states
        time.sleep(0.05)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _reached(lines: list[str]) -> str:
    """What a rank said last that it was about to do."""
    steps = [line for line in lines if line.split(" ")[0] in ("loading", "meeting", "summing")]
    return steps[-1] if steps else "starting"


def _ending(state: int, lines: list[str]) -> str:
    """How a rank ended: a signal, or the last line of its traceback."""
    if state < 0:
        return f"was ended by signal {-state}"
    return f"ended with an error: {next((line for line in reversed(lines) if line.strip()), 'it said nothing')}"


def _remedy(backend: str) -> str:
    """What most often helps, most likely first."""
    if backend == "nccl":
        return "NCCL_P2P_DISABLE=1 NCCL_DEBUG=INFO python -m shardrun doctor  # does it work without peer-to-peer?"
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return f"GLOO_SOCKET_IFNAME={loopback} python -m shardrun doctor  # does it work on the loopback device?"
