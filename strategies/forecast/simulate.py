"""Rank r of N on a laptop: what it will hold and send, read off a log of the engine's own run without data.

The engine (DistributedDataParallel, fully_shard, DeepSpeed), the model, the optimizer and all settings are the real
ones; tensors and the other ranks are not there (strategies/forecast/fake.py). So nothing of an engine is modelled: its
buckets, padding, prefetching and habits of letting go show as they are, at any world size, in seconds.

By default the figures are a GPU's: CUDA's choice of attention kernel and autocast dtypes, NCCL, which copies nothing.
With `emulate_gloo` they are those of ranks on CPU, to be compared with measurements there. Attention is the flash
kernel's for 16-bit inputs without a mask; a model with a document mask [batch, 1, time, time] gets the
memory-efficient kernel's and pays for the mask, as it does on a GPU. A model's own kernels, which need a GPU, are
stood in for by whoever knows them (`StandIns`).

Not in the figures: what else an operator allocates for its own work and lets go before it returns; the CUDA context
and NCCL's buffers. cuBLAS's workspaces and what the caching allocator makes of it all: strategies/ledger/allocator.py.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from strategies import catalogue
from strategies.base import Precision, Settings, Strategy
from strategies.errors import UserError
from strategies.forecast.fake import fake_rank, gloo_copies, gpu_kernels
from strategies.ledger.replay import Replay, replay
from strategies.ledger.tracer import Inside, Tracer
from strategies.mesh import Place
from strategies.optimizer import Recipe


def _version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class StandIns:
    """What replaces, on tensors without data, the kernels that a model brings along."""

    patches: Callable[[], AbstractContextManager[None]]
    """Entered around the whole run."""
    inside: Inside
    """As in strategies.ledger.tracer.Tracer."""


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
    options: dict[str, Any] | None = None,
    stand_ins: StandIns | None = None,
    version: tuple[int, int] | None = None,
) -> Replay:
    """Train as this rank under this strategy, on fake tensors.

    model: builds it, plain; weights need no values. batch: rows and tokens of a micro-batch. engine: as in
    strategies.base.Settings. steps: two at least, since the first one still makes optimizer state and buckets.
    options: of every call of the model. stand_ins: for kernels of the model. version: torch's on the GPU, by default
    the one here.

    Raises ValueError, in one sentence, where a simulation cannot go.
    """
    engine = engine or {}
    _check(name, rank, world_size, engine, steps)
    names: dict[int, str] = {}
    inside = stand_ins.inside if stand_ins else None
    tracer = Tracer(names, gloo_copies if emulate_gloo else inside)
    patches = stand_ins.patches() if stand_ins else nullcontext()
    with fake_rank(rank, world_size, name), tracer, patches:
        strategy = catalogue.engine(name, Settings(Place(rank, world_size, torch.device("cpu")), precision, engine))
        plain = model()
        if any(module._compiled_call_impl or hasattr(module, "_orig_mod") for module in plain.modules()):
            raise UserError("A simulation cannot see into torch.compile: simulate the model without it.")
        tracer.buffers = lambda: strategy.held().get("communication buffers", ())
        names |= {id(module): path or type(module).__name__ for path, module in plain.named_modules()}

        def enter(step: int, phase: str) -> None:
            if tracer.phase == "forward":
                # Gathered parameters stand in for the lasting ones now. FSDP2's have a category; ZeRO-3's get one.
                tracer.mark(strategy.held()["parameters"], "communication buffers", overwrite=False)
            else:
                for category, tensors in strategy.held().items():
                    tracer.mark(tensors, category)
            tracer.enter(step, phase)

        with nullcontext() if emulate_gloo else gpu_kernels(version or _version()):
            train(strategy, plain, recipe, batch, clip, accumulation, steps, enter, options)
        events = tracer.events
    return replay(events, steps - 1)


def _check(name: str, rank: int, world_size: int, engine: dict[str, Any], steps: int) -> None:
    if name not in catalogue.names():
        raise UserError(f"There is no strategy {name!r}; it is one of {', '.join(catalogue.names())}.")
    if not 0 <= rank < world_size or (name == "single" and world_size > 1):
        raise UserError(f"There is no rank {rank} of {world_size} under {name}.")
    if steps < 2:
        raise UserError(f"A simulation of {steps} step has no steady state: the second step is the first to have it.")
    zero = engine.get("zero_optimization", {})
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device", "none") != "none":
            raise UserError(f"A simulation has one kind of memory and cannot follow {part}: remove it.")
    if engine.get("offload"):
        raise UserError("A simulation has one kind of memory and cannot follow fsdp_offload_params: remove it.")


def train(
    strategy: Strategy,
    model: nn.Module,
    recipe: Recipe,
    batch: tuple[int, int],
    clip: float,
    accumulation: int,
    steps: int,
    enter: Callable[[int, str], None],
    options: dict[str, Any] | None = None,
) -> None:
    """Prepare and train on zeros, as the trainer does. enter(step, phase) is called where the next phase begins."""
    strategy.prepare(model, recipe, clip=clip, accumulation=accumulation)
    for step in range(steps):
        for i in range(accumulation):
            inputs, targets = (torch.zeros(batch, dtype=torch.int64) for _ in range(2))
            enter(step, "forward")
            with strategy.micro_batch(last=i == accumulation - 1):
                loss = strategy.model(inputs, targets, **(options or {}))
                enter(step, "backward")
                strategy.backward(loss)
        del inputs, targets, loss
        enter(step, "step")
        strategy.step()
    enter(steps, "end")
