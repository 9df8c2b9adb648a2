"""What benchmarks/train_step.py measures, on every rank: steps of the trainer's own parts, timed and taken apart."""

import contextlib
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from shardrun.machine import cpu_name
from speedrun.books.flops import flops
from speedrun.config import Config
from speedrun.data import open_data, prefetch
from speedrun.kernels import choose
from speedrun.model import GPT
from speedrun.model.compiling import compile_blocks
from speedrun.optim.policy import parameter_groups
from speedrun.optim.schedule import forward_options
from speedrun.run.command_line import parse
from speedrun.run.ending import guarded
from speedrun.stages import Stage, resolve_stages
from speedrun.train import set_schedules
from strategies import select, strict_json
from strategies.base import Strategy
from strategies.errors import UserError
from strategies.ledger.hardware import GPUS
from strategies.select import Launch

WARM_UP = 3
"""Steps before any is timed: allocations, compilation, the optimizer's state."""

PHASES = ("data", "forward", "backward", "optimizer")


def main() -> None:
    """Arguments: the file for the result, what the batch is divided by, steps to time, then the trainer's own."""
    file, share, steps, trainer = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    launch = select.launched()
    config = parse(trainer)[1]
    last = alone(config, resolve_stages(config, config.steps, launch.world_size)[-1], share)
    loop = Loop(config, launch, last, select.start(launch))
    with loop.batches(last):
        loop.many(WARM_UP)
        if loop.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        whole = loop.many(steps)["step"]
        apart = loop.many(steps, apart=True)
        exchange = _exchange(lambda: loop.many(2), 2) if launch.world_size > 1 else 0.0
    tokens = last.stage.tokens_per_step
    seen = dataclasses.replace(config.data, sequence_length=last.stage.sequence_length)
    needed = flops(dataclasses.replace(loop.config, data=seen), last.stage.batches.rows) / whole
    name, peak = peak_rate(loop.device)
    result = {
        "device": name,
        "ranks": launch.world_size,
        "strategy": launch.strategy,
        "precision": launch.precision,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "tokens_per_step": tokens,
        "accumulation": last.stage.batches.accumulation,
        "kernels": loop.config.model.kernels,
        "step_s": whole,
        "tokens_per_second": tokens / whole,
        "mfu": needed / peak if peak else None,
        "peak_rate": peak,
        "peak_bytes": peak_bytes(loop.device),
        "phases_s": {name: apart[name] for name in PHASES} | {"exchange": exchange},
    }
    if launch.rank == 0:
        file.write_text(strict_json.dumps(result))


@dataclasses.dataclass(frozen=True)
class Alone:
    """A stage as one that lasts for the whole run, and the step at which it begins in the real one."""

    stage: Stage
    begins: int


def alone(config: Config, stage: Stage, share: int) -> Alone:
    """A stage of the run alone, its batch divided by `share`. Raises ValueError where the batch does not divide."""
    if stage.global_batch % share:
        raise UserError(f"a batch of {stage.global_batch} rows does not divide by {share}: choose another --share.")
    batch = stage.global_batch // share
    return Alone(dataclasses.replace(stage, first=0, last=config.steps, global_batch=batch), stage.first)


class Loop:
    """The trainer's parts, put together as train.py does, for steps of a stage, and then of another one.

    strategy: not yet prepared.
    """

    def __init__(self, config: Config, launch: Launch, first: Alone, strategy: Strategy):
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, stages=()))
        kernels, _ = choose(config.model.kernels, "cpu" if launch.cpu else "cuda", launch.precision)
        self.config = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels=kernels))
        self.launch, self.strategy = launch, strategy
        data = open_data(config.data, config.model.vocab_size, config.seed, [first.stage])
        self.model = GPT(self.config.model, document_start=data.document_start)
        self.model.init_weights(config.seed)
        if config.compile:
            compile_blocks(self.model, launch.cpu)
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        recipe = parameter_groups(shapes, config.optimizer, kernels)
        accumulation = first.stage.batches.accumulation
        strategy.prepare(self.model, recipe, clip=config.optimizer.clip, accumulation=accumulation)
        self.device = strategy.optimizer.place.device
        self.taken_apart = False
        self.times: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "step")}

    @contextlib.contextmanager
    def batches(self, now: Alone) -> Iterator[None]:
        """Around steps of that stage: its windows, its accumulation, its rows fetched ahead."""
        self.now, cut = now, now.stage.batches
        self.model.set_windows(now.stage.windows)
        self.strategy.set_accumulation(cut.accumulation)
        data = open_data(self.config.data, self.config.model.vocab_size, self.config.seed, [now.stage])
        self.numbers = iter(range(10**9))
        items = ([data.batch(n, *rows) for rows in cut.micro_batches(self.launch.rank)] for n in range(10**9))
        with prefetch(items, depth=2) as self.upcoming:
            yield

    def many(self, count: int, apart: bool = False) -> dict[str, float]:
        """Median seconds of every phase over `count` steps; apart: the device is waited for after each phase."""
        self.taken_apart = apart
        for kept in self.times.values():
            kept.clear()
        for _ in range(count):
            self._step(next(self.numbers))
        return {name: statistics.median(kept) for name, kept in self.times.items()}

    def _step(self, number: int) -> None:
        for kept in self.times.values():
            kept.append(0.0)
        moment = min(self.now.begins + number, self.config.steps - 1)
        options = forward_options(self.config, moment, self.config.steps)
        with self._phase("step"):
            with self._phase("data"):
                batch = next(self.upcoming)
            set_schedules(self.strategy, self.config, moment, self.config.steps, self.now.stage)
            for i, (inputs, targets) in enumerate(batch):
                with self._phase("data"):
                    inputs, targets = (
                        inputs.to(self.device, non_blocking=True),
                        targets.to(self.device, non_blocking=True),
                    )
                with self.strategy.micro_batch(last=i == len(batch) - 1):
                    with self._phase("forward"):
                        loss = self.strategy.model(inputs, targets, **options)
                    with self._phase("backward"):
                        self.strategy.backward(loss)
            with self._phase("optimizer"):
                self.strategy.step()

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Adds to the phase's last time. Waits for the device at both ends, but for the step as a whole: what it does
        side by side stays so."""
        wait = self.device.type == "cuda" and (self.taken_apart or name == "step")
        if wait:
            torch.cuda.synchronize()
        started = time.perf_counter()
        yield
        if wait:
            torch.cuda.synchronize()
        self.times[name][-1] += time.perf_counter() - started


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
