"""A Python that starts warm: torch, accelerate and DeepSpeed take seconds to import, and are imported once.

`Warm` keeps a server that has imported them, and a folder with a `python` and an `accelerate`. That `python` is a small
client (warm_client.py): the server forks, and the fork runs what the client was asked for, with the client's
environment, folder and open files. sys.executable is the client there too, so that whatever is started from there is
warm as well: the ranks of torchrun, the fork server of multiprocessing.

What is imported in advance has read its settings already: the number of OpenMP threads is the server's, and so is
whether Triton's kernels are interpreted. Linux only. Tests of how processes start and end use a real Python.
"""

import array
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib.util
import json
import multiprocessing
import os
import runpy
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any

import psutil

IMPORTED = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.run"),
    *("accelerate.commands.launch", "matplotlib.pyplot", "numpy", "rich.console", "safetensors.torch", "tyro", "yaml"),
    *("deepspeed", "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder.all_ops"),
    *("deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("speedrun.train", "strategies.ddp", "strategies.fsdp", "strategies.zero", "lessons.kit"),
)
START_SECONDS = 120.0
SET_CHILD_SUBREAPER = 36
"""prctl's number for it: whoever loses its parent becomes a child of this process."""


class Warm:
    """The server, and the folder of its clients; `interpreted`: as in an environment with TRITON_INTERPRET=1.

    Raises AssertionError where the server does not start.
    """

    def __init__(self, interpreted: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="warm-"))
        self.python = self.folder / "python"
        address = self.folder / "socket"
        kernels = "1" if interpreted else "0"
        program = Path(__file__).with_name("warm_client.py")
        client = f"exec {sys.executable} -IS {program} {address} {kernels} {sys.executable}"
        _write_program(self.python, f'{client} "$@"')
        _write_program(self.folder / "accelerate", f'{client} -m accelerate.commands.accelerate_cli "$@"')
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(address), str(self.python)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "MPLBACKEND": "Agg", "DEEPSPEED_LOG_LEVEL": "ERROR", "TRITON_INTERPRET": kernels},
            stdin=subprocess.PIPE,  # when it ends, the server does
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_SECONDS
        while not address.exists():
            assert self._server.poll() is None and time.monotonic() < deadline, "the warm server did not start"
            time.sleep(0.05)

    def close(self) -> None:
        """End the server and whatever was started from it."""
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(30)
        shutil.rmtree(self.folder)


def _write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def serve(address: str, python: str) -> None:
    """Fork for every client that connects, until stdin ends."""
    for name in IMPORTED:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    gc.collect()
    gc.freeze()  # no collection of a fork looks at these objects again, and so copies their pages
    sys.executable = python
    multiprocessing.set_executable(python)
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)  # a client finds a server that listens
    forks: dict[int, tuple[int, socket.socket]] = {}  # descriptor of the process → its number, and its client
    while True:
        ready, _, _ = select.select([listener, sys.stdin, *forks], [], [])
        if sys.stdin in ready:
            break
        for descriptor in forks.keys() & ready:
            pid, client = forks.pop(descriptor)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(OSError):
                client.sendall(struct.pack("i", status))
            client.close()
            os.close(descriptor)
        if listener in ready:
            client, _ = listener.accept()
            request, files = _receive(client)
            pid = os.fork()
            if pid == 0:
                _run(request, files)
            with contextlib.suppress(OSError):  # the client was killed
                client.sendall(struct.pack("i", pid))
            forks[os.pidfd_open(pid)] = pid, client
            for file in files:
                os.close(file)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(0)  # without the reports of libraries that take down what nobody needs any more


def _receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What a client asks for, and its open files, in the order of request["files"]."""
    first, ancillary, _, _ = client.recvmsg(4, socket.CMSG_SPACE(253 * 4))
    (length,) = struct.unpack("I", first)
    text = client.recv(length, socket.MSG_WAITALL)
    return json.loads(text), [fd for _, _, data in ancillary for fd in array.array("i", data)]


def _run(request: dict[str, Any], files: list[int]) -> None:
    """In the fork: become what the client would have been, to the end."""
    os.setsid()  # signals come through the client, once
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, 500) for file in files]  # out of the way of the client's numbers
    os.closerange(3, 500)
    for file, number in zip(moved, request["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = open(number, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        stream.reconfigure(line_buffering=mode == "w" and (number == 2 or request["unbuffered"] or stream.isatty()))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    status = _main(request["kind"], request["arguments"])
    threading._shutdown()  # type: ignore[attr-defined]  waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _main(kind: str, arguments: list[str]) -> int:
    """Run `-m MODULE …`, `-c CODE …` or `FILE …`; returns the exit status."""
    sys.argv = arguments if kind == "file" else [kind, *arguments[1:]]
    first = str(Path(arguments[0]).resolve().parent) if kind == "file" else os.getcwd() if kind == "-m" else ""
    added = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [first, *added, *(part for part in sys.path[1:] if part not in added)]
    sys.modules.pop("tests", None)  # of the server, whose folder may not be the job's
    try:
        if kind == "-m":
            sys.modules.pop(arguments[0], None)  # runpy warns of what is there already
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(arguments[0], main.__dict__)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(*sys.argv[1:])
