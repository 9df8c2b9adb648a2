"""A step of a preset as one of eight GPUs has it, stage by stage: ours eager and compiled, beside a plain torch loop
around the same model, and for `gpt2` beside nanoGPT's model where its checkout is given.

Ours is the trainer's own step (benchmarks/train_step_loop.py), its rows fetched ahead; the others have their batch on
the device. Launches, device time and the longest kernels are per step, from torch.profiler.
"""

import dataclasses
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.results import Cell, Result, asked
from benchmarks.gpu.sizes import config_of, tokens, with_tokens
from benchmarks.plain import plain_update
from benchmarks.train_step_loop import WARM_UP, Alone, Loop, alone
from speedrun.config import Config
from speedrun.data import open_data
from speedrun.optim.schedule import forward_options
from speedrun.stages import resolve_stages
from strategies import catalogue
from strategies.base import Settings
from strategies.mesh import Place
from strategies.select import Launch

SHARE = 8
"""The batch divided by so many, as one of eight GPUs has it."""

LONGEST = 10
"""So many of the longest kernels are named."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all ways of taking a step have in common."""

    preset: str
    config: Config
    launch: Launch
    stages: list[Alone]
    warm_up: int
    """Steps before any is timed."""
    steps: int
    """How many are timed."""
    result: Result

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.launch.cpu else "cuda")


def main() -> None:
    arguments = asked()
    (preset,) = arguments.what
    tiny = arguments.tiny
    launch = Launch("single", 0, 0, 1, 1, "fp32" if tiny else "bf16", tiny)
    config = with_tokens(config_of(preset, tiny), tokens(arguments.result.work(), tiny), tiny)
    stages = [alone(config, stage, SHARE) for stage in resolve_stages(config, config.steps)]
    if tiny:
        stages = stages[:: max(1, len(stages) - 1)]  # the first and the last
    bench = Bench(preset, config, launch, stages, 1 if tiny else WARM_UP, 2 if tiny else 20, arguments.result)
    if tiny:
        bench.result.note("Compiled: left out at tiny sizes.")
    for compiled in (False,) if tiny else (False, True):
        model = ours(bench, compiled)
        plain(bench, model, compiled)
        del model
        empty()
    if arguments.peer:
        for compiled in (False,) if tiny else (False, True):
            peer(bench, arguments.peer, compiled)
            empty()


def ours(bench: Bench, compiled: bool) -> torch.nn.Module:
    """The trainer's step, every stage. Returns the model, which lies on the device."""
    config = dataclasses.replace(bench.config, compile=compiled)
    strategy = catalogue.engine("single", Settings(Place(0, 1, bench.device), bench.launch.precision, {}))
    loop = Loop(config, bench.launch, bench.stages[0], strategy)
    for index, part in enumerate(bench.stages):
        with loop.batches(part):
            first = clock(bench.device, lambda: loop.many(bench.warm_up))
            reset_peak(bench.device)
            step = loop.many(bench.steps)["step"]
            peak = peak_bytes(bench.device)
            apart = loop.many(max(1, bench.steps // 2), apart=True)
            parts = {f"{phase} (ms)": 1e3 * apart[phase] for phase in ("forward", "backward", "optimizer")}
            add(bench, way("ours", compiled), index, part, step, first, peak, lambda: loop.many(1), parts)
    return loop.model


def plain(bench: Bench, model: torch.nn.Module, compiled: bool) -> None:
    """A loop by hand around the same model, compiled or not as it is: autocast, backward, clip, update."""
    dtype = torch.float32 if bench.launch.cpu else torch.bfloat16
    update = plain_update(model, bench.config.optimizer, dtype)
    for index, part in enumerate(bench.stages):
        model.set_windows(part.stage.windows)
        batch = on_device(bench, part)
        options = forward_options(bench.config, part.begins, bench.config.steps)

        def step(batch: Any = batch, options: Any = options) -> None:
            for inputs, targets in batch:
                with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.launch.precision == "bf16"):
                    loss = model(inputs, targets, **options)
                (loss / len(batch)).backward()
            update()

        timed(bench, way("plain loop", compiled), index, part, step)


def peer(bench: Bench, folder: Path, compiled: bool) -> None:
    """The GPT of nanoGPT's model.py with its own optimizer, at the same shape, without biases, as its bench.py has it:
    beside the first stage only."""
    spec = importlib.util.spec_from_file_location("peer_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = bench.config.model
    config = module.GPTConfig(
        block_size=shape.max_sequence_length,
        vocab_size=-(-shape.vocab_size // shape.pad_vocab_to) * shape.pad_vocab_to,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        dropout=0.0,
        bias=False,
    )
    model = module.GPT(config).to(bench.device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), bench.device.type)
    run = torch.compile(model) if compiled else model
    part = bench.stages[0]
    batch = on_device(bench, part)

    def step() -> None:
        for inputs, targets in batch:
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.launch.precision == "bf16"):
                loss = run(inputs, targets)[1]
            (loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timed(bench, way("nanoGPT's model", compiled), 0, part, step)


def way(name: str, compiled: bool) -> str:
    return f"{name}, compiled" if compiled else f"{name}, eager"


def on_device(bench: Bench, part: Alone) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of the stage's first step."""
    data = open_data(bench.config.data, bench.config.model.vocab_size, bench.config.seed, [part.stage])
    return [
        tuple(tensor.to(bench.device) for tensor in data.batch(0, *rows))  # type: ignore[misc]
        for rows in part.stage.batches.micro_batches(rank=0)
    ]


def timed(bench: Bench, name: str, index: int, part: Alone, step: Callable[[], None]) -> None:
    """Warm up, time, and keep what it took."""
    first = clock(bench.device, lambda: [step() for _ in range(bench.warm_up)])
    reset_peak(bench.device)
    seconds = statistics.median(clock(bench.device, step) for _ in range(bench.steps))
    add(bench, name, index, part, seconds, first, peak_bytes(bench.device), step, {})


def add(
    bench: Bench,
    name: str,
    index: int,
    part: Alone,
    seconds: float,
    first: float,
    peak: int | None,
    step: Callable[[], object],
    parts: dict[str, float],
) -> None:
    """A row of the table, and the longest kernels of another step."""
    # AdamW may update at every other step only: an average over as many as that takes. (A CPU's says nothing.)
    steps = 1 if bench.launch.cpu else bench.config.optimizer.adamw_every
    launches, device_milliseconds, longest = kernels(bench.device, step, steps)
    stage = part.stage
    cells: dict[str, Cell] = {
        "way": name,
        "stage": index,
        "rows × tokens": f"{stage.global_batch} × {stage.sequence_length}",
        "windows": " and ".join(map(str, stage.windows[-1])) if any(stage.windows[-1]) else "none",
        "ms": 1e3 * seconds,
        **{column: parts.get(column) for column in ("forward (ms)", "backward (ms)", "optimizer (ms)")},
        "launches": launches,
        "device (ms)": device_milliseconds,
        "peak (bytes)": peak,
        "warm-up (s)": first,
    }
    bench.result.row("Steps", **cells)
    for kernel in longest:
        bench.result.row(f"The {LONGEST} longest kernels, {name}, stage {index}", **kernel)


def kernels(device: torch.device, step: Callable[[], object], steps: int) -> tuple[float, float, list[dict[str, Cell]]]:
    """Per step, over so many: how many kernels (on a CPU: operators) it starts, their seconds, and the longest ones."""
    cuda = device.type == "cuda"
    step()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    # A name for a stretch of time, such as "Optimizer.step", is none of what is started in it.
    events = [e for e in profiler.key_averages() if e.device_type == wanted and not e.is_user_annotation]

    def milliseconds(event: Any) -> float:
        return (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / steps

    events.sort(key=milliseconds, reverse=True)
    longest: list[dict[str, Cell]] = [
        {"kernel": event.key[:90], "calls": event.count / steps, "ms": milliseconds(event)}
        for event in events[:LONGEST]
    ]
    return sum(event.count for event in events) / steps, sum(map(milliseconds, events)), longest


def clock(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds, the device waited for at both ends."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """What torch's allocator handed out at most; a CPU has none that counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def empty() -> None:
    """Let go of what is dead."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
