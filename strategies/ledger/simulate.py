"""Rank r of N on a laptop: what it will hold and send, read off a log of the engine's own run without data.

The engine (DistributedDataParallel, fully_shard, DeepSpeed), the model, the optimizer and all settings are the real
ones; tensors and the other ranks are not there (strategies/ledger/fake.py). So nothing of an engine is modelled: its
buckets, padding, prefetching and habits of letting go show as they are, at any world size, in seconds.

By default the figures are a GPU's: CUDA's choice of attention kernel and autocast dtypes, NCCL, which copies nothing.
With `emulate_gloo` they are those of ranks on CPU, to be compared with measurements there. Attention is the flash
kernel's for 16-bit inputs without a mask; a model with a document mask [batch, 1, time, time] gets the
memory-efficient kernel's and pays for the mask, as it does on a GPU.

Not in the figures: what an operator allocates for its own work and lets go before it returns; the CUDA context,
NCCL's and cuBLAS's workspaces; and what the caching allocator reserves beyond what is allocated.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from strategies import select
from strategies.base import Precision, Settings, Strategy
from strategies.ledger.fake import fake_rank, gloo_copies, gpu_kernels
from strategies.ledger.tracer import Event, Tracer
from strategies.matrices import Place
from strategies.optimizer import Recipe

Held = dict[str, int]
"""Bytes by category: strategies.base.CATEGORIES, "activations" (made in a forward pass for the backward pass) and
"other" (temporaries, among them gradients of activations, and the batch)."""

BLOCK_NUMBER = re.compile(r"\.\d+")

PASSES = ("forward", "backward", "recompute")
"""The phases in which the peak is looked for; recompute is a forward pass inside backward, of gradient checkpointing.
"""


@dataclass
class Simulation:
    """What a simulated rank did. Everything but `events` is about the last step."""

    events: list[Event]
    """The whole log, from before the strategy's preparation on."""
    moments: dict[str, Held]
    """What was alive "after prepare", "after forward", "after backward", "after step" and at the "peak" of forward and
    backward; after forward and backward of the last micro-batch."""
    largest: list[tuple[str, int]]
    """What the peak is made of: category, module and operator that allocated it, how often; and bytes. Largest first.
    """
    collectives: dict[str, tuple[int, int]]
    """Calls and payload bytes (see strategies/ledger/wire.py) by collective; "… (bookkeeping)" for norms and flags."""

    @property
    def peak(self) -> Held:
        return self.moments["peak"]

    @property
    def peak_total(self) -> int:
        return sum(self.peak.values())


def simulate(
    name: str,
    rank: int,
    world_size: int,
    model: Callable[[], nn.Module],
    recipe: Recipe,
    batch: tuple[int, int],
    clip: float = 1.0,
    accumulation: int = 1,
    precision: Precision = "bf16",
    engine: dict[str, Any] | None = None,
    steps: int = 2,
    emulate_gloo: bool = False,
) -> Simulation:
    """Train as this rank under this strategy, on fake tensors.

    model: builds it, plain; weights need no values. batch: rows and tokens of a micro-batch. engine: as in
    strategies.base.Settings. steps: two at least, since the first one still makes optimizer state and buckets.

    Raises ValueError, in one sentence, where a simulation cannot go.
    """
    engine = engine or {}
    _check(name, rank, world_size, engine, steps)
    names: dict[int, str] = {}
    tracer = Tracer(names, gloo_copies if emulate_gloo else None)
    with fake_rank(rank, world_size, deepspeed=name.startswith("zero")), tracer:
        strategy = select.make(name, Settings(Place(rank, world_size, torch.device("cpu")), precision, engine))
        plain = model()
        if any(module._compiled_call_impl or hasattr(module, "_orig_mod") for module in plain.modules()):
            raise ValueError("A simulation cannot see into torch.compile: simulate the model without it.")
        names |= {id(module): path or type(module).__name__ for path, module in plain.named_modules()}

        def enter(step: int, phase: str) -> None:
            if (
                tracer.phase != "forward"
            ):  # in between, gathered and other passing tensors stand in for the lasting ones
                for category, tensors in strategy.held().items():
                    tracer.mark(tensors, category)
            tracer.enter(step, phase)

        with nullcontext() if emulate_gloo else gpu_kernels():
            train(strategy, plain, recipe, batch, clip, accumulation, steps, enter)
        events = tracer.events
    return _read(events, steps - 1)


def _check(name: str, rank: int, world_size: int, engine: dict[str, Any], steps: int) -> None:
    if name not in select.NAMES:
        raise ValueError(f"There is no strategy {name!r}; it is one of {', '.join(select.NAMES)}.")
    if not 0 <= rank < world_size or (name == "single" and world_size > 1):
        raise ValueError(f"There is no rank {rank} of {world_size} under {name}.")
    if steps < 2:
        raise ValueError(f"A simulation of {steps} step has no steady state: the second step is the first to have it.")
    zero = engine.get("zero_optimization", {})
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device", "none") != "none":
            raise ValueError(f"A simulation has one kind of memory and cannot follow {part}: remove it.")


def train(
    strategy: Strategy,
    model: nn.Module,
    recipe: Recipe,
    batch: tuple[int, int],
    clip: float,
    accumulation: int,
    steps: int,
    enter: Callable[[int, str], None],
) -> None:
    """Prepare and train on zeros, as the trainer does. enter(step, phase) is called where the next phase begins."""
    strategy.prepare(model, recipe, clip=clip, accumulation=accumulation)
    for step in range(steps):
        for i in range(accumulation):
            inputs, targets = (torch.zeros(batch, dtype=torch.int64) for _ in range(2))
            enter(step, "forward")
            with strategy.micro_batch(last=i == accumulation - 1):
                loss = strategy.model(inputs, targets)
                enter(step, "backward")
                strategy.backward(loss)
        del inputs, targets, loss
        enter(step, "step")
        strategy.step()
    enter(steps, "end")


def _read(events: list[Event], step: int) -> Simulation:
    """Play the log back."""
    _categorise(events)
    alive: dict[int, Event] = {}
    held: Counter[str] = Counter()
    moments: dict[str, Held] = {}
    at_peak: list[Event] = []
    total = peak = 0
    phase = "prepare"
    end = Event("compute", 0, 0, "", "end", step + 1, "")
    for event in [*events, end]:
        if event.phase not in (phase, "recompute"):
            if phase == "prepare" or event.step >= step:
                moments[f"after {phase}"] = dict(held)
            phase = event.phase
        if event.kind == "alloc":
            alive[event.id] = event
            held[event.category] += event.bytes
            total += event.bytes
        elif event.kind == "free":
            held[alive.pop(event.id).category] -= event.bytes
            total -= event.bytes
        if event.step == step and event.phase in PASSES and total > peak:
            peak, moments["peak"], at_peak = total, dict(held), list(alive.values())
    return Simulation(events, moments, _largest(at_peak), _collectives(events, step))


def _categorise(events: list[Event]) -> None:
    """What no one has named: made in a forward pass and alive in the backward pass it was made for, or else passing."""
    ends = {event.id: event.phase for event in events if event.kind == "free"}
    for event in events:
        if event.kind == "alloc" and not event.category:
            end = ends.get(event.id)
            saved = (event.phase == "forward" and end in ("backward", "recompute")) or (
                event.phase == "recompute" and end == "backward"
            )
            event.category = "activations" if saved else "other"


def _largest(alive: Iterable[Event]) -> list[tuple[str, int]]:
    bytes: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in alive:
        who = f"{event.category}: {BLOCK_NUMBER.sub('.*', event.tag)}"
        bytes[who] += event.bytes
        times[who] += 1
    return [(f"{who} ×{times[who]}" if times[who] > 1 else who, size) for who, size in bytes.most_common()]


def _collectives(events: list[Event], step: int) -> dict[str, tuple[int, int]]:
    result: dict[str, tuple[int, int]] = {}
    for event in events:
        if event.kind == "collective" and event.step == step:
            name = event.tag if event.category == "payload" else f"{event.tag} (bookkeeping)"
            calls, bytes = result.get(name, (0, 0))
            result[name] = (calls + 1, bytes + event.bytes)
    return result
