"""What a rank is predicted to hold and how long a step takes, for a preset or a shape on a GPU."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from shardrun import fields
from shardrun.fields import with_fields
from speedrun.books.flops import flops
from speedrun.books.forward_pass import ForwardPass
from speedrun.books.kernels import (
    CPU,
    Kernels,
    attention_kinds,
    installed_torch,
    kernels_on_gpu,
    parse_version,
)
from speedrun.books.shapes import scenario_of
from speedrun.config import Config, ModelConfig
from speedrun.optim.policy import check_optimizer
from speedrun.presets import PRESETS
from speedrun.ranges import check_ranges
from speedrun.run.asked import options_said
from speedrun.stages import Batches, Stage, check_lengths, number_of_steps, resolve_stages
from speedrun.wiring import check_model
from strategies.errors import UserError
from strategies.forecast.predict import predict_host
from strategies.forecast.timing import communication
from strategies.forecast.traffic import paper_volumes, predict_traffic
from strategies.ledger.hardware import MORE, Gpu, Utilisation, outside_allocator, utilisation
from strategies.ledger.terms import Entry, Scenario

TENSORS = ("parameters", "master parameters", "gradients", "optimizer states", "activations", "buffers")
"""Activations with what passes beside them at the peak."""

OTHER = ("overhead", "context", "NCCL")
"""Beside tensors: `ForwardPass.overhead`, and what lies outside torch's allocator (`outside_allocator`)."""

COLUMNS = (*TENSORS, *OTHER)

OVERHEAD = (
    "Allocator: what it holds beside the tensors, cuBLAS's workspaces (two of 32 MiB on Hopper, of 8.1 MiB "
    "before) and rounding to its blocks. Source: strategies/ledger/allocator.py."
)


@dataclass(frozen=True)
class Planned:
    """A stage of a run, with the kernels that compute it."""

    config: Config
    """With the row length and the windows of the stage."""
    stage: Stage
    kernels: Kernels = CPU

    @property
    def batches(self) -> Batches:
        """How its global batch is cut over the ranks."""
        return self.stage.batches

    @property
    def forward_pass(self) -> ForwardPass:
        """Of its micro-batches."""
        return forward_pass(self.config, self.batches.micro_batch, self.kernels)

    @property
    def about_kernels(self) -> dict[str, str]:
        """For people, as `Kernels.as_dict`."""
        return self.kernels.as_dict(attention_kinds(self.config.model, self.stage.sequence_length, self.kernels))

    def __str__(self) -> str:
        name = f"{self.stage.name}: " if self.stage.name != "data" else ""
        rows = "1 row" if self.batches.micro_batch == 1 else f"{self.batches.micro_batch} rows"
        return f"{name}{rows} of {self.stage.sequence_length} tokens × {self.batches.accumulation}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "stage": self.stage.name,
            "micro_batch": self.batches.micro_batch,
            "accumulation": self.batches.accumulation,
            "sequence_length": self.stage.sequence_length,
        }


@dataclass(frozen=True)
class Estimate:
    """One strategy on one number of ranks. Bytes are of the rank that holds most; times are in seconds."""

    planned: Planned
    books: Scenario
    memory: dict[str, int]
    host: dict[str, int]
    """In host memory just before the update, by category, where the engine's settings offload. It is not in the total.
    """
    moments: dict[str, int]
    """Moment → bytes that the rank holds then, all but activations and buffers alike at every moment."""
    spare: int
    traffic: list[Entry]
    volumes: dict[str, float]
    compute_s: float
    communication_s: float
    exposed_s: float
    shares: Utilisation
    """Of the peak rate: what `compute_s` assumes, and how far from it measured steps were."""

    @property
    def strategy(self) -> str:
        return self.books.strategy

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def tight(self) -> bool:
        """Whether it fits, and within the margin of the total might not."""
        return self.fits and self.spare < MORE * self.total

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def step_range_s(self) -> tuple[float, float]:
        """The least and the most that a step takes, by what was measured of others."""
        least, most = (self.shares.typical / share for share in (self.shares.most, self.shares.least))
        return self.compute_s * least + self.exposed_s, self.compute_s * most + self.exposed_s

    @property
    def tokens_per_s(self) -> float:
        return self.planned.stage.tokens_per_step / self.step_s


def shaped(arguments: argparse.Namespace) -> bool:
    """Whether a shape is planned that is no preset's."""
    return any((arguments.params, arguments.layers, arguments.width, arguments.heads, arguments.vocab))


def preset_of(arguments: argparse.Namespace) -> str:
    """The preset that is planned, or whose settings a shape takes."""
    return arguments.preset or ("modern" if shaped(arguments) else "speedrun")


def configure(arguments: argparse.Namespace) -> Config:
    """The preset or shape asked for; a shape's rows go into `arguments`. Raises ValueError where it cannot be."""
    preset = preset_of(arguments)
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}.")
    config = PRESETS[preset][1]
    said = options_said(arguments.fields)
    if shaped(arguments) and not said & {"data.micro_batch", "data.global_batch"}:
        arguments.micro_batch = 8 if arguments.micro_batch is None else arguments.micro_batch
        arguments.accumulation = 1 if arguments.accumulation is None else arguments.accumulation
    if arguments.world < 1:
        raise UserError("--world is at least 1.")
    if not 0 <= arguments.rank < arguments.world:
        raise UserError(f"there is no rank {arguments.rank} of {arguments.world}; --rank counts from 0.")
    model = config.model
    if arguments.params:
        model = shape_of(parse_count(arguments.params))
    changes: dict[str, Any] = {
        "layers": arguments.layers,
        "width": arguments.width,
        "heads": arguments.heads,
        "vocab_size": arguments.vocab,
    }
    model = dataclasses.replace(model, **{name: value for name, value in changes.items() if value is not None})
    if arguments.width and not arguments.heads:
        model = dataclasses.replace(model, heads=max(1, arguments.width // 128))
    check_ranges(model, "model.")
    if model.width % model.heads and not said & {"model.heads", "model.width"}:
        raise UserError(f"{model.heads} heads do not divide a width of {model.width}; pass --heads.")
    stages = () if shaped(arguments) else config.schedule.stages
    if arguments.seq is not None:
        stages = tuple(dataclasses.replace(stage, sequence_length=arguments.seq) for stage in stages)
    length = config.data.sequence_length if arguments.seq is None else arguments.seq
    check_ranges(dataclasses.replace(config.data, sequence_length=length), "data.")
    lengths = (length, config.data.eval_sequence_length or 0, *(stage.sequence_length for stage in stages))
    model = dataclasses.replace(
        model,
        checkpointing=arguments.checkpointing or model.checkpointing,
        max_sequence_length=max(*lengths, 1024 if model.positions != "learned" else length),
    )
    optimizer = config.optimizer
    if arguments.optimizer:
        optimizer = dataclasses.replace(optimizer, name=arguments.optimizer)
    config = dataclasses.replace(
        config,
        model=model,
        optimizer=optimizer,
        schedule=dataclasses.replace(config.schedule, stages=stages),
        data=dataclasses.replace(config.data, sequence_length=length),
    )
    check_ranges(config)
    config = with_fields(config, preset, arguments)
    if (
        "tokens" in said and "steps" not in said and config.tokens
    ):  # the budget ends the run, and not the preset's steps
        config = dataclasses.replace(config, steps=min(10**9, max(config.steps, config.tokens)))
    check_model(config.model)
    check_optimizer(config.optimizer)
    return config


def inputs(config: Config, gpu: Gpu, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that a plan is of, for JSON; micro_batch and accumulation as they were asked for."""
    return {
        "preset": preset_of(arguments),
        "config": dataclasses.asdict(config),
        "optimizer": config.optimizer.name,
        "checkpointing": config.model.checkpointing,
        "world_size": arguments.world,
        "precision": arguments.precision,
        "micro_batch": arguments.micro_batch,
        "accumulation": arguments.accumulation,
        "accelerate_config": getattr(arguments, "config", None),
        "gpu": dataclasses.asdict(gpu),
        "tokens": config.tokens,
    }


def kernels_for(config: Config, gpu: Gpu, arguments: argparse.Namespace) -> Kernels:
    """The kernels of the run on that GPU with --torch."""
    version = parse_version(arguments.torch) if arguments.torch else installed_torch()
    return kernels_on_gpu(gpu.capability, version, config.model, arguments.precision)


def planned(
    config: Config,
    arguments: argparse.Namespace,
    world_size: int,
    kernels: Kernels = CPU,
) -> list[Planned]:
    """Every stage of the run on so many ranks, with the rows that --micro-batch and --accumulation ask for.

    kernels: of the device. Raises ValueError, in the trainer's own words,
    for a run that the trainer refuses.
    """
    at_most, accumulation = arguments.micro_batch, arguments.accumulation
    if any(count is not None and count < 1 for count in (at_most, accumulation)):
        raise UserError("--micro-batch and --accumulation are at least 1.")
    table, data = config.schedule.stages, config.data
    if at_most:
        table = tuple(dataclasses.replace(line, micro_batch=0) for line in table)
        data = dataclasses.replace(data, micro_batch=at_most)
    if at_most and accumulation:
        table = tuple(dataclasses.replace(line, global_batch=0) for line in table)
        data = dataclasses.replace(data, global_batch=at_most * accumulation * world_size)
    config = dataclasses.replace(config, data=data, schedule=dataclasses.replace(config.schedule, stages=table))
    check_ranges(config)
    stages = resolve_stages(config, number_of_steps(config), world_size)
    check_lengths(config, stages)
    if accumulation and not at_most:
        stages = [_in_micro_batches(stage, accumulation) for stage in stages]
    return [Planned(at_stage(config, stage), stage, kernels) for stage in stages]


def _in_micro_batches(stage: Stage, accumulation: int) -> Stage:
    rows = stage.batches.rows
    if rows % accumulation:
        raise UserError(
            f"--accumulation {accumulation} does not divide a rank's {rows} rows ({stage.name}.global_batch "
            f"{stage.global_batch} over {stage.world_size} ranks); use a divisor of {rows}, or set --micro-batch too."
        )
    return dataclasses.replace(stage, micro_batch=rows // accumulation)


def at_stage(config: Config, stage: Stage) -> Config:
    """The run as it is in one of its stages: its row length, its windows."""
    short, long = stage.windows[-1]
    model = dataclasses.replace(config.model, window_short=short, window_long=long)
    data = dataclasses.replace(config.data, sequence_length=stage.sequence_length)
    return dataclasses.replace(config, model=model, data=data)


def parse_count(text: str) -> int:
    """'124M' → 124000000. Raises ValueError for what is no size of a GPT."""
    count = fields.parse_count(text, "--params", "size of a GPT", "350M, 7B or 1T")
    if count < 1e5:
        raise UserError(f"--params {text!r} is no size of a GPT; write for example 350M, 7B or 1T.")
    return count


def shape_of(parameters: int) -> ModelConfig:
    """A GPT of about so many parameters: width 128 times the layers, heads of 128, a GPT-2 vocabulary, tied."""
    rows = 50_304
    layers = 1
    while 12 * (layers + 1) * (128 * (layers + 1)) ** 2 + rows * 128 * (layers + 1) <= parameters:
        layers += 1
    # The layers are the shape's; the width makes up for what is missing, in steps of a head.
    width = 128 * layers
    while 12 * layers * (width + 128) ** 2 + rows * (width + 128) <= parameters:
        width += 128
    return dataclasses.replace(
        PRESETS["modern"][1].model, layers=layers, width=width, heads=width // 128, vocab_size=50_257, tied_head=True
    )


def forward_pass(config: Config, micro_batch: int, kernels: Kernels) -> ForwardPass:
    """A micro-batch of the run, with as many tokens in the loss as it ever has."""
    future = len(config.schedule.future_weights)
    return ForwardPass(config.model, micro_batch, config.data.sequence_length, future, kernels)


def memory_of(config: Config, books: Scenario, micro_batch: int, kernels: Kernels = CPU) -> dict[str, int]:
    """Bytes by category at the peak of a step's passes, of the rank that holds most: with gradients that wait from one
    micro-batch to the next, wherever they do.
    """
    forward = forward_pass(config, micro_batch, kernels)
    rank = max(forward.predict_peak(books), key=lambda held: sum(held.values()))
    memory = dict(rank)
    memory["activations"] += memory.pop("other")
    memory["buffers"] = memory.pop("communication buffers")
    memory["overhead"] = sum(forward.overhead(books).values())
    if kernels.cuda:
        memory |= outside_allocator({entry.collective for entry in predict_traffic(books)}, books.world_size)
    return memory


def fullest(
    stages: list[Planned], strategy: str, world_size: int, precision: str, engine: dict[str, Any] | None = None
) -> tuple[Planned, Scenario, dict[str, int]]:
    """The stage that needs most memory, what predictions need to know of it, and its bytes by category."""
    rows = []
    for stage in stages:
        books = scenario_of(stage.config, strategy, world_size, precision, stage.batches.accumulation, engine)
        rows.append((stage, books, memory_of(stage.config, books, stage.batches.micro_batch, stage.kernels)))
    return max(rows, key=lambda row: sum(row[2].values()))


def host_memory(books: Scenario) -> dict[str, int]:
    """Bytes by category in host memory just before the update, of the rank that has most there; nothing where nothing
    is offloaded.
    """
    ranks = [rank["after backward"] for rank in predict_host(books)]
    return max(ranks, key=lambda held: sum(held.values()), default={})


def estimate(
    stages: list[Planned],
    strategy: str,
    world_size: int,
    precision: str,
    gpu: Gpu,
    engine: dict[str, Any] | None = None,
) -> Estimate:
    """Predict one strategy, in the stage of the run that needs most memory. engine: of an accelerate config."""
    planned, books, memory = fullest(stages, strategy, world_size, precision, engine)
    entries = predict_traffic(books, rank=0)
    shares = utilisation(gpu, planned.config.model.width)
    compute = flops(planned.config, planned.batches.rows) / (gpu.flops * shares.typical)
    total, exposed = communication(entries, books.strategy, compute, books.accumulation, gpu.link)
    return Estimate(
        planned=planned,
        books=books,
        memory=memory,
        host=host_memory(books),
        moments=moments_of(planned, books, memory),
        spare=gpu.memory - sum(memory.values()),
        traffic=entries,
        volumes=paper_volumes(entries, books.parameters),
        compute_s=compute,
        communication_s=total,
        exposed_s=exposed,
        shares=shares,
    )


def moments_of(planned: Planned, books: Scenario, memory: dict[str, int]) -> dict[str, int]:
    """Moment → bytes that the rank which holds most at the peak holds then. memory: its, at the peak."""
    found = planned.forward_pass.moments(books)
    other = sum(memory.get(category, 0) for category in OTHER)
    return {**{moment: bytes + other for moment, bytes in found.items()}, "peak": sum(memory.values())}


def kernels_line(planned: Planned) -> str:
    """What a stage's figures are of; the precision of its activations differs between strategies."""
    what = planned.about_kernels
    return f"{what['device']}, torch {what['torch']}, kernels {what['kernels']}, attention {what['attention']}"
