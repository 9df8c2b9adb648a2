"""A pool of ranks: processes in one gloo group, started once per world size and reused by every test."""

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class RankPool:
    """`run` calls a module-level function on every rank of a world and returns the results by rank.

    A rank that raises fails the call with its traceback; one that hangs is killed with its whole world after `timeout`
    seconds, its stack printed, and the next call starts that world anew.
    """

    def __init__(self) -> None:
        self._worlds: dict[int, list[tuple[Any, Connection]]] = {}

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        if world_size not in self._worlds:
            self._worlds[world_size] = _start(world_size)
        world = self._worlds[world_size]
        for _, pipe in world:
            pipe.send((function.__module__, function.__qualname__, args))
        deadline = time.monotonic() + timeout
        results: list[Any] = []
        for rank, (_, pipe) in enumerate(world):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self._kill(world_size)
                raise AssertionError(f"rank {rank} of {world_size} hung in {function.__qualname__} for {timeout:.0f} s")
            try:
                ok, result = pipe.recv()
            except EOFError:
                self._kill(world_size)
                raise AssertionError(f"rank {rank} of {world_size} died in {function.__qualname__}") from None
            if not ok:
                self._kill(world_size)  # the others may wait for it in a collective
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{result}")
            results.append(result)
        return results

    def close(self) -> None:
        for world_size in list(self._worlds):
            for _, pipe in self._worlds[world_size]:
                pipe.close()  # ends the rank
            for process, _ in self._worlds[world_size]:
                process.join(5)
            self._kill(world_size)

    def _kill(self, world_size: int) -> None:
        for process, _ in self._worlds.pop(world_size):
            if process.is_alive():
                if hasattr(signal, "SIGVTALRM"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGVTALRM)  # its stacks, to stderr
                    time.sleep(0.2)
                process.kill()
                process.join(5)


def processes() -> Any:
    """multiprocessing, whose processes are forked from one that has imported everything once (tests/preload.py), where
    that can be: they take 0.1 s each, not 4."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


def _start(world_size: int) -> list[tuple[Any, Connection]]:
    context = processes()
    store = Path(tempfile.mkdtemp()) / "store"
    world = []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, world_size, store.as_uri(), theirs), daemon=True)
        process.start()
        theirs.close()
        world.append((process, ours))
    return world


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    if hasattr(signal, "SIGVTALRM"):
        faulthandler.register(signal.SIGVTALRM, all_threads=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo",
    )
    import torch
    import torch.distributed as dist

    import tests.preload  # noqa: F401  there already, where this process was forked

    linear = torch.nn.functional.linear
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=100))
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        torch.nn.functional.linear = linear  # ZeRO-3 replaces it for the whole process and leaves it so
        gc.collect()
        pipe.send(answer)
