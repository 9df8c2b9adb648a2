"""Real bytes on real ranks: torch's CPU allocator replaced by one that counts (counting_allocator.cpp).

Independent of everything in strategies/ledger: it sees no operators and no tensors, only allocations.
"""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("counting_allocator.cpp")


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++")


def build(folder: Path) -> Path:
    """Compile it against this torch. Seconds, since it needs torch's smallest library only."""
    root = Path(torch.__file__).parent
    library = folder / "counting_allocator.so"
    command = [
        *(compiler() or "c++", "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(library)),
        *(f"-I{root / 'include'}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"),
        *(f"-L{root / 'lib'}", "-lc10", f"-Wl,-rpath,{root / 'lib'}"),
    ]
    subprocess.run(command, check=True)
    return library


@functools.cache
def install(library: str) -> ctypes.CDLL:
    """Count from now on, for as long as this process lives. Offers live_bytes(), peak_bytes() and reset_peak()."""
    counter = ctypes.CDLL(library)
    counter.live_bytes.restype = counter.peak_bytes.restype = ctypes.c_longlong
    counter.install()
    return counter
