"""One rank under a strategy, in a process of its own, without the seconds of accelerate launch above it."""

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu.results import Result
from shardrun.configs import resolve_config
from shardrun.launch import shipped_config
from strategies import catalogue
from strategies.base import Precision
from strategies.select import Launch


def strategies_here(result: Result) -> list[str]:
    """Those that can run; the result says which cannot."""
    every = ["single", *catalogue.spread()]
    needing = [name for name in every if catalogue.books(name).needs == "deepspeed"]
    there = result.has("deepspeed", without=", ".join(needing))
    return [name for name in every if there or name not in needing]


def launch_alone(strategy: str, cpu: bool, precision: Precision) -> Launch:
    """What `select.launched()` says to the only rank under the shipped config of that strategy. Puts what a launcher
    exports for a process group into the environment, so it belongs into a process of its own."""
    config = resolve_config(shipped_config(f"cpu/{strategy}" if cpu else strategy))
    if strategy != "single":
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return Launch(strategy, 0, 0, 1, 1, precision, cpu, config.engine, str(config.path))


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a process that holds nothing yet, and hand back what it returns.

    With CUDA that is a new interpreter, as CUDA does not survive a fork; else a fork, which has imported everything.

    Raises RuntimeError with the traceback where the function raises, or where the process dies.
    """
    cuda = torch.cuda.is_available()
    context: Any = multiprocessing.get_context("spawn" if cuda else "fork")
    gc.collect()
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, function, arguments), daemon=True)
    process.start()
    there.close()
    try:
        worked, answer = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__}{arguments} died with status {process.exitcode}") from None
    process.join()
    if not worked:
        raise RuntimeError(answer)
    return answer


def _serve(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = (True, function(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way
