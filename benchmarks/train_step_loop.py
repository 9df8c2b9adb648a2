"""What benchmarks/train_step.py measures, on every rank: steps of the trainer's own parts, timed and taken apart."""

import contextlib
import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardrun.machine import cpu_name
from shardrun.plan import flops
from speedrun.compiling import compile_blocks
from speedrun.config import Config
from speedrun.data import open_data, prefetch
from speedrun.ending import guarded
from speedrun.kernels import choose
from speedrun.model import GPT
from speedrun.optim.policy import parameter_groups
from speedrun.optim.schedule import forward_options
from speedrun.stages import Section, cut_batches, resolve
from speedrun.train import parse, set_schedules
from strategies import select
from strategies.ledger.hardware import GPUS

WARM_UP = 3
"""Steps before any is timed: allocations, compilation, the optimizer's state."""

PHASES = ("data", "forward", "backward", "optimizer")


def main() -> None:
    """Arguments: the file for the result, what the batch is divided by, steps to time, then the trainer's own."""
    file, share, steps, trainer = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    launch = select.launched()
    config = parse(trainer)[1]
    section, begins = last_stage(config, share)
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, stages=()))
    batches = cut_batches(config, section, launch.world_size, launch.engine)
    kernels, _ = choose(config.model.kernels, "cpu" if launch.cpu else "cuda", launch.precision)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels=kernels))
    data = open_data(config.data, config.model.vocab_size, config.seed, [section])
    model = GPT(config.model, document_start=data.document_start)
    model.init_weights(config.seed)
    if config.compile:
        compile_blocks(model, config, launch)
    recipe = parameter_groups({name: tuple(p.shape) for name, p in model.named_parameters()}, config.optimizer, kernels)
    strategy = select.start(launch)
    strategy.prepare(model, recipe, clip=config.optimizer.clip, accumulation=batches.accumulation)
    model.set_windows(section.windows)
    device = strategy.optimizer.place.device
    times: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "step")}
    taken_apart = False

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        """Adds to the phase's last time. Waits for the device at both ends, but for the step as a whole: what it does
        side by side stays so."""
        wait = device.type == "cuda" and (taken_apart or name == "step")
        if wait:
            torch.cuda.synchronize()
        started = time.perf_counter()
        yield
        if wait:
            torch.cuda.synchronize()
        times[name][-1] += time.perf_counter() - started

    def step(number: int, upcoming: Iterator[list[tuple[Tensor, Tensor]]]) -> None:
        for kept in times.values():
            kept.append(0.0)
        moment = min(begins + number, config.steps - 1)
        options = forward_options(config, moment, config.steps)
        with phase("step"):
            with phase("data"):
                batch = next(upcoming)
            set_schedules(strategy, config, moment, config.steps, section)
            for i, (inputs, targets) in enumerate(batch):
                with phase("data"):
                    inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                with strategy.micro_batch(last=i == len(batch) - 1):
                    with phase("forward"):
                        loss = strategy.model(inputs, targets, **options)
                    with phase("backward"):
                        strategy.backward(loss)
            with phase("optimizer"):
                strategy.step()

    def many(count: int, apart: bool) -> dict[str, float]:
        """Median seconds of every phase over `count` steps."""
        nonlocal taken_apart
        taken_apart = apart
        for kept in times.values():
            kept.clear()
        for _ in range(count):
            step(next(numbers), upcoming)
        return {name: statistics.median(kept) for name, kept in times.items()}

    numbers = iter(range(10**9))
    items = ([data.batch(n, *rows) for rows in batches.micro_batches(launch.rank)] for n in range(10**9))
    with prefetch(items, depth=2) as upcoming:
        many(WARM_UP, apart=False)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        whole = many(steps, apart=False)["step"]
        apart = many(steps, apart=True)
        exchange = _exchange(lambda: many(2, apart=False), 2) if launch.world_size > 1 else 0.0
    tokens = section.global_batch * section.sequence_length
    seen = dataclasses.replace(config.data, sequence_length=section.sequence_length)
    needed = flops(dataclasses.replace(config, data=seen), batches.rows) / whole
    name, peak = peak_rate(device)
    result = {
        "device": name,
        "ranks": launch.world_size,
        "strategy": launch.strategy,
        "precision": launch.precision,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "tokens_per_step": tokens,
        "accumulation": batches.accumulation,
        "kernels": kernels,
        "step_s": whole,
        "tokens_per_second": tokens / whole,
        "mfu": needed / peak if peak else None,
        "peak_rate": peak,
        "peak_bytes": peak_bytes(device),
        "phases_s": {name: apart[name] for name in PHASES} | {"exchange": exchange},
    }
    if launch.rank == 0:
        file.write_text(json.dumps(result))


def last_stage(config: Config, share: int) -> tuple[Section, int]:
    """The run's last stage as one that lasts for the whole run, its batch divided by `share`; and the step at which it
    begins in the run.

    Raises ValueError where the batch does not divide.
    """
    last = resolve(config, config.steps)[-1]
    if last.global_batch % share:
        raise ValueError(f"a batch of {last.global_batch} rows does not divide by {share}: choose another --share.")
    whole = dataclasses.replace(last, first=0, last=config.steps, global_batch=last.global_batch // share)
    return whole, last.first


def peak_rate(device: torch.device) -> tuple[str, float | None]:
    """The device's kind, and floating-point operations per second that count as all it can do: a GPU's dense bf16 peak
    (None where its data sheet is not in our table); of a CPU, what torch's float32 product of 1024 × 1024 matrices
    reaches at best on this process's threads, since a data sheet does not tell what a shared core gets."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        kind = next((gpu for key, gpu in GPUS.items() if key in name.lower().replace(" ", "")), None)
        return name, kind.flops if kind else None
    matrix = torch.randn(1024, 1024)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return cpu_name(), 2 * 1024**3 / min(seconds)


def peak_bytes(device: torch.device) -> int:
    """On a GPU what torch's allocator handed out at most while steps were timed; on a CPU the most that this process
    ever had in memory, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _exchange(run: Callable[[], Any], steps: int) -> float:
    """Seconds per step that collectives took, whatever else went on beside them."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=kinds) as profiler:
        run()
    total = 0.0
    for event in profiler.key_averages():
        if event.key.startswith("gloo:"):
            total += event.cpu_time_total
        elif event.key.startswith("ncclDevKernel"):
            total += event.device_time_total
    return total / 1e6 / steps


if __name__ == "__main__":
    guarded(main)
