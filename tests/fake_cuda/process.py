"""The process in which the fake GPUs are: started once, asked for one function after another.

Torch is imported in neither of the two before it has to be: here in functions, there after the shim.
"""

import ctypes
import importlib
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class FakeCUDAProcess:
    """`run` calls a module-level function in the process and returns what it returns; an exception fails the call with
    its traceback, and a call that takes more than `timeout` seconds ends the process.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        library = str(_compile(Path(self._folder.name)))
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(library, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
        self._pipe.send((function.__module__, function.__qualname__, args))
        if not self._pipe.poll(timeout):
            self.close()
            raise AssertionError(f"{function.__qualname__} took more than {timeout:.0f} s")
        succeeded, result = self._pipe.recv()
        if not succeeded:
            raise AssertionError(result)
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._folder.cleanup()


def _compile(folder: Path) -> Path:
    """The shim as a shared library, for the torch that is installed."""
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shutil.which(os.environ.get("CXX", "g++")) or "clang++"
    library = folder / "shim.so"
    paths = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
    found = [f"-Wl,-rpath,{path}" for path in library_paths()]
    source = Path(__file__).with_name("shim.cpp")
    command = [compiler, "-std=c++20", "-shared", "-fPIC", *paths, *found, str(source), "-o", str(library)]
    subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True, capture_output=True, text=True)
    return library


def _serve(library: str, pipe: Connection) -> None:
    for variable in ("ACCELERATE_USE_CPU", "TRITON_INTERPRET"):
        os.environ.pop(variable, None)
    os.environ |= {"OMP_NUM_THREADS": "1", "DEEPSPEED_LOG_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": ""}
    # DeepSpeed decides once, when it is first imported: a call may do that outside fake_gpus.
    os.environ["DS_ACCELERATOR"] = "cuda"
    shim = ctypes.CDLL(library)

    import torch

    shim.set_guard()
    torch.set_num_threads(1)
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
