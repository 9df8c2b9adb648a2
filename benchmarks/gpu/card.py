"""The machine: which card, which versions, and how fast the card itself is.

Cards of one name differ: an H100 has been met that gave two thirds of another's products. So these two rates stand
beside every result.
"""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata

import torch

from benchmarks.gpu.results import asked, write_json
from shardrun.machine import cores, cpu_name
from strategies import strict_json

REPEATS = 20


def main() -> None:
    arguments = asked()
    cuda = torch.cuda.is_available() and not arguments.tiny
    device = torch.device("cuda" if cuda else "cpu")
    machine = {
        "cuda": cuda,
        "card": torch.cuda.get_device_name(device) if cuda else f"no card, {cpu_name()}",
        **(on_card(device) if cuda else {}),
        "CPU cores": cores(),
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: version(name) for name in ("triton", "accelerate", "deepspeed", "numpy")},
        **rates(device),
    }
    print(strict_json.dumps(machine, indent=1))
    write_json(arguments.result.file, machine)


def on_card(device: torch.device) -> dict[str, str | int | None]:
    """What only a card has."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "driver": driver(),
        "CUDA": torch.version.cuda,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory (bytes)": properties.total_memory,
    }


def rates(device: torch.device) -> dict[str, float]:
    """bf16 products of 8192³ in TFLOP/s, and a copy of 1 GiB in TB/s, its bytes counted as read and as written; on a
    CPU of sizes that take no time."""
    size, elements = (8192, 2**29) if device.type == "cuda" else (256, 2**20)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return {
        f"rate of {size}³ bf16 products (TFLOP/s)": 2 * size**3 / seconds(lambda: a @ b, device) / 1e12,
        "rate of copies (TB/s)": 2 * 2 * elements / seconds(lambda: target.copy_(source), device) / 1e12,
    }


def seconds(function: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Median seconds of a run, after as many that do not count, the device waited for."""

    def once() -> float:
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for _ in range(repeats):
        once()
    return statistics.median(once() for _ in range(repeats))


def driver() -> str:
    """Its version, as nvidia-smi says it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown")


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
