"""`shardrun plan`: predicted memory, traffic and step time of every strategy: what fits, and what it costs.

Plain arithmetic: nothing is allocated, started or downloaded, and torch is not loaded (but for --court and --simulate).
"""

import argparse
import dataclasses
import json
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from speedrun.books.forward_pass import ForwardPass, compute_precision
from speedrun.books.kernels import (
    CPU,
    Kernels,
    attention_kinds,
    installed_torch,
    kernels_on_gpu,
    parse_version,
)
from speedrun.books.shapes import parameter_groups, parameter_shapes, scenario_of
from speedrun.config import Config, ModelConfig, OptimizerConfig
from speedrun.presets import PRESETS
from speedrun.stages import Batches, Stage, check_engine, number_of_steps, resolve
from speedrun.wiring import check
from strategies import catalogue
from strategies.forecast.timing import communication
from strategies.forecast.traffic import explain_volume, paper_volumes, predict_traffic
from strategies.ledger.hardware import GIB, LATENCY, MFU, Gpu, find_gpu
from strategies.ledger.terms import Entry, Scenario

COLUMNS = ("parameters", "master parameters", "gradients", "optimizer states", "activations", "buffers", "overhead")
"""Activations with what passes beside them at the peak; overhead: `ForwardPass.overhead`."""


OVERHEAD = (
    "Over.: what torch's allocator holds beside the tensors, cuBLAS's workspaces (two of 32 MiB on Hopper, of 8.1 MiB "
    "before) and rounding to its blocks. Sources: strategies/ledger/allocator.py."
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
    spare: int
    traffic: list[Entry]
    volumes: dict[str, float]
    compute_s: float
    communication_s: float
    exposed_s: float

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
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "preset",
        nargs="?",
        help=f"{', '.join(PRESETS)}: the trainer's own run of it, in the stage that needs most memory (default: "
        "speedrun). With --params or a shape, only the preset's other settings are used (default: modern)",
    )
    parser.add_argument("--params", help="plan a GPT of about this size instead: 350M, 7B, 1T")
    for name, what in (
        ("layers", "number of layers"),
        ("width", "width"),
        ("heads", "number of heads"),
        ("vocab", "vocabulary"),
        ("seq", "row length"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"override the model's {what}")
    parser.add_argument("--world", type=int, default=8, help="ranks (default: 8)")
    parser.add_argument("--gpu", default="h100", help="h100, h200, a100, rtx4090 or a memory in GiB (default: h100)")
    parser.add_argument(
        "--micro-batch",
        type=int,
        help="rows of one forward pass (default: 8); with a preset, the most in any stage (default: its own)",
    )
    parser.add_argument(
        "--accumulation",
        type=int,
        help="micro-batches of a step (default: 1); with a preset, those of every stage (default: what batch and "
        "micro-batch make). Both together set the batch: micro-batch × accumulation × ranks",
    )
    parser.add_argument("--torch", help="torch's version on the GPU, such as 2.11 (default: the one installed here)")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), help="override the preset's optimizer")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default: bf16")
    parser.add_argument("--checkpointing", choices=("none", "block", "selective"), help="default: the preset's")
    parser.add_argument("--sweep", action="store_true", help="totals for 1, 2, 4 … 1024 ranks")
    parser.add_argument("--court", action="store_true", help="what public estimators say, and why they differ")
    parser.add_argument("--simulate", action="store_true", help="run the engines themselves, on tensors without data")
    parser.add_argument("--rank", type=int, default=0, help="with --simulate: which rank (default: 0)")
    parser.add_argument("--strategies", help="with --simulate: comma-separated (default: all five)")
    parser.add_argument("--largest", type=int, default=6, help="with --simulate: lines per peak (default: 6)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    config = configure(arguments)
    gpu = find_gpu(arguments.gpu)
    if arguments.court:
        return _court(config, arguments)
    if arguments.simulate:
        from shardrun.plan import simulation

        return simulation.run(config, gpu, arguments)
    if arguments.sweep:
        return _sweep(config, gpu, arguments)
    stages = planned(config, arguments, arguments.world, kernels=kernels_for(config, gpu, arguments))
    names = catalogue.spread(arguments.world)
    estimates = [estimate(stages, name, arguments.world, arguments.precision, gpu) for name in names]
    if arguments.json:
        settings = {
            "preset": preset_of(arguments),
            "optimizer": config.optimizer.name,
            "precision": arguments.precision,
            "checkpointing": config.model.checkpointing,
        }
        rows = [_row(e) for e in estimates]
        print(json.dumps({"schema": 1, **settings, "gpu": dataclasses.asdict(gpu), "estimates": rows}))
        return 0
    _headline(config, gpu, arguments, estimates)
    _print_memory(estimates, gpu)
    _print_traffic(estimates)
    print(textwrap.fill(advice(estimates), 98))
    return 0


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
        raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}.")
    config = PRESETS[preset][1]
    if shaped(arguments):
        arguments.micro_batch = 8 if arguments.micro_batch is None else arguments.micro_batch
        arguments.accumulation = 1 if arguments.accumulation is None else arguments.accumulation
    if arguments.world < 1:
        raise ValueError("--world is at least 1.")
    if not 0 <= arguments.rank < arguments.world:
        raise ValueError(f"there is no rank {arguments.rank} of {arguments.world}; --rank counts from 0.")
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
    if model.layers < 1 or model.width < 1 or model.heads < 1 or model.width % model.heads:
        raise ValueError(f"{model.heads} heads do not divide a width of {model.width}; pass --heads.")
    stages = () if shaped(arguments) else config.schedule.stages
    if arguments.seq:
        stages = tuple(dataclasses.replace(stage, sequence_length=arguments.seq) for stage in stages)
    length = arguments.seq or config.data.sequence_length
    lengths = (length, *(stage.sequence_length for stage in stages))
    model = dataclasses.replace(
        model,
        checkpointing=arguments.checkpointing or model.checkpointing,
        max_sequence_length=max(*lengths, 1024 if model.positions != "learned" else length),
    )
    check(model)
    optimizer = config.optimizer
    if arguments.optimizer:
        optimizer = dataclasses.replace(optimizer, name=arguments.optimizer)
    return dataclasses.replace(
        config,
        model=model,
        optimizer=optimizer,
        schedule=dataclasses.replace(config.schedule, stages=stages),
        data=dataclasses.replace(config.data, sequence_length=length),
    )


def kernels_for(config: Config, gpu: Gpu, arguments: argparse.Namespace) -> Kernels:
    """The kernels of the run on that GPU with --torch."""
    version = parse_version(arguments.torch) if arguments.torch else installed_torch()
    return kernels_on_gpu(gpu.capability, version, config.model, arguments.precision)


def planned(
    config: Config,
    arguments: argparse.Namespace,
    world_size: int,
    engine: dict[str, Any] | None = None,
    kernels: Kernels = CPU,
) -> list[Planned]:
    """Every stage of the run on so many ranks, with the rows that --micro-batch and --accumulation ask for.

    engine: the settings of an accelerate config; kernels: of the device. Raises ValueError, in the trainer's own words,
    for a run that the trainer refuses.
    """
    at_most, accumulation = arguments.micro_batch, arguments.accumulation
    if any(count is not None and count < 1 for count in (at_most, accumulation)):
        raise ValueError("--micro-batch and --accumulation are at least 1.")
    table, data = config.schedule.stages, config.data
    if at_most:
        table = tuple(dataclasses.replace(line, micro_batch=0) for line in table)
        data = dataclasses.replace(data, micro_batch=at_most)
    if at_most and accumulation:
        table = tuple(dataclasses.replace(line, global_batch=0) for line in table)
        data = dataclasses.replace(data, global_batch=at_most * accumulation * world_size)
    config = dataclasses.replace(config, data=data, schedule=dataclasses.replace(config.schedule, stages=table))
    stages = resolve(config, number_of_steps(config), world_size)
    if accumulation and not at_most:
        stages = [_in_micro_batches(stage, accumulation) for stage in stages]
    for stage in stages:
        check_engine(config, stage, engine or {})
    return [Planned(at_stage(config, stage), stage, kernels) for stage in stages]


def _in_micro_batches(stage: Stage, accumulation: int) -> Stage:
    rows = stage.batches.rows
    if rows % accumulation:
        raise ValueError(
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
    """'124M' → 124000000. Raises ValueError for what is no count."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.upper())
    count = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2]] if match else 0.0
    if count < 1e5:
        raise ValueError(f"--params {text!r} is no size of a GPT; write for example 350M, 7B or 1T.")
    return round(count)


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
    return {**memory, "overhead": sum(forward.overhead(books).values())}


def fullest(
    stages: list[Planned], strategy: str, world_size: int, precision: str, engine: dict[str, Any] | None = None
) -> tuple[Planned, Scenario, dict[str, int]]:
    """The stage that needs most memory, what predictions need to know of it, and its bytes by category."""
    rows = []
    for stage in stages:
        books = scenario_of(stage.config, strategy, world_size, precision, stage.batches.accumulation, engine)
        rows.append((stage, books, memory_of(stage.config, books, stage.batches.micro_batch, stage.kernels)))
    return max(rows, key=lambda row: sum(row[2].values()))


def estimate(stages: list[Planned], strategy: str, world_size: int, precision: str, gpu: Gpu) -> Estimate:
    """Predict one strategy, in the stage of the run that needs most memory."""
    planned, books, memory = fullest(stages, strategy, world_size, precision)
    entries = predict_traffic(books, rank=0)
    compute = flops(planned.config, planned.batches.rows) / (gpu.flops * MFU)
    total, exposed = communication(entries, books.strategy, compute, books.accumulation, gpu.link)
    return Estimate(
        planned=planned,
        books=books,
        memory=memory,
        spare=gpu.memory - sum(memory.values()),
        traffic=entries,
        volumes=paper_volumes(entries, books.parameters),
        compute_s=compute,
        communication_s=total,
        exposed_s=exposed,
    )


def flops(config: Config, rows: int) -> float:
    """Floating-point operations of one forward and backward pass over so many rows.

    Per token 6 for each matrix parameter (the tied head counts, an untied embedding does not), and for attention
    12·layers·width·length, halved because it is causal (Kaplan et al., arXiv 2001.08361). Full checkpointing computes
    the forward pass again.
    """
    model, length = config.model, config.data.sequence_length
    hidden = model.mlp_width or 4 * model.width
    matrices = model.layers * (4 * model.width**2 + 2 * model.width * hidden)
    head = -(-model.vocab_size // model.pad_vocab_to) * model.pad_vocab_to * model.width
    per_token = 6 * (matrices + head) + 6 * model.layers * model.width * length
    return rows * length * per_token * (4 / 3 if model.checkpointing == "block" else 1)


def advice(estimates: list[Estimate]) -> str:
    """The quickest that fits and the one with most room, or what to do where none fits: at most two lines."""
    fitting = [e for e in estimates if e.fits]
    if not fitting:
        least = min(estimates, key=lambda e: e.total)
        return (
            f"Nothing fits: {least.strategy} comes closest and lacks {-least.spare / GIB:.1f} GiB.\n"
            "Try more ranks, a smaller --micro-batch, or --checkpointing block."
        )
    best = min(fitting, key=lambda e: (round(e.step_s, 4), e.total))
    roomy = min(fitting, key=lambda e: e.total)
    line = f"Advice: {best.strategy} fits with {best.spare / GIB:.1f} GiB to spare and has the shortest step."
    if roomy.strategy != best.strategy:
        line += f"\n{roomy.strategy} leaves {roomy.spare / GIB:.1f} GiB for a larger micro-batch."
    return line


def _row(e: Estimate) -> dict[str, Any]:
    apart = ("planned", "books", "traffic")
    row = {field.name: getattr(e, field.name) for field in dataclasses.fields(e) if field.name not in apart}
    traffic = [dataclasses.asdict(entry) for entry in e.traffic]
    names = {"strategy": e.strategy, "world_size": e.books.world_size, "parameters": e.books.parameters}
    return {
        **names,
        **e.planned.as_dict(),
        "predicted_for": {**e.planned.about_kernels, "precision": compute_precision(e.books)},
        **row,
        "total": e.total,
        "fits": e.fits,
        "step_s": e.step_s,
        "traffic": traffic,
    }


def _headline(config: Config, gpu: Gpu, arguments: argparse.Namespace, estimates: list[Estimate]) -> None:
    """estimates: none for a sweep."""
    model = config.model
    psi = scenario_of(config, "single", 1, arguments.precision).parameters
    ranks = str(arguments.world) if estimates else "1 … 1024"
    print(
        f"{psi / 1e6:,.1f}M parameters ({model.layers} layers, width {model.width}, {model.heads} heads, "
        f"{config.optimizer.name}) in {arguments.precision}\n"
        f"{ranks} × {gpu.name}, {gpu.memory / GIB:.1f} GiB each, checkpointing {model.checkpointing}"
    )
    by_stage: dict[str, list[str]] = {}
    for e in estimates:
        by_stage.setdefault(str(e.planned), []).append(e.strategy)
    for stage, names in by_stage.items():
        under = f", under {', '.join(names)}" if len(by_stage) > 1 else ""
        most = f" (of {len(config.schedule.stages)} stages the one that needs most memory{under})"
        print(stage + (most if config.schedule.stages else ""))
    for line in dict.fromkeys(kernels_line(e.planned) for e in estimates):
        print(line)
    print()


def kernels_line(planned: Planned) -> str:
    """What a stage's figures are of; the precision of its activations differs between strategies."""
    what = planned.about_kernels
    return f"{what['device']}, torch {what['torch']}, kernels {what['kernels']}, attention {what['attention']}"


def table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print a table, within 100 columns where there is no terminal to ask; columns move together before any is cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    cells = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    padding = 1 if sum(cells) + 3 * len(cells) + 1 <= console.width else 0
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, padding))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _gib(amount: float) -> str:
    return f"{amount / GIB:,.2f}" if amount else "–"


def _print_memory(estimates: list[Estimate], gpu: Gpu) -> None:
    headings = [
        "GiB per GPU",
        "params",
        "masters",
        "grads",
        "optim",
        "activ.",
        "buffers",
        "over.",
        "total",
        "",
        "spare",
    ]
    rows = []
    for e in estimates:
        filled = min(8, round(8 * e.total / gpu.memory))
        bar = "█" * filled + "·" * (8 - filled)
        spare = f"{e.spare / GIB:+,.1f}" if e.fits else f"{e.spare / GIB:,.1f} no"
        rows.append([e.strategy, *(_gib(e.memory.get(c, 0)) for c in COLUMNS), _gib(e.total), bar, spare])
    table("What the fullest GPU holds at its peak (predicted)", headings, rows)
    for precision in dict.fromkeys(compute_precision(e.books) for e in estimates):
        names = [e.strategy for e in estimates if compute_precision(e.books) == precision]
        wrapped("", f"Activations {'in' if precision != 'autocast' else 'under'} {precision}: {', '.join(names)}.")
    wrapped("", OVERHEAD)
    wrapped("", "Gradients at the peak: with accumulation those of the micro-batches before wait there.")
    print()


def _print_traffic(estimates: list[Estimate]) -> None:
    headings = ["per step", "payload", "on the wire", "in Ψ", "compute", "comm.", "exposed", "step", "tokens/s"]
    rows = []
    for e in estimates:
        tokens = e.planned.stage.tokens_per_step
        payload = sum(entry.payload_bytes for entry in e.traffic)
        wire = sum(entry.ring_bytes for entry in e.traffic)
        times = [f"{seconds * 1e3:,.1f} ms" for seconds in (e.compute_s, e.communication_s, e.exposed_s, e.step_s)]
        volume = f"{e.volumes.get('total', 0):.2f}"
        rows.append([e.strategy, _gib(payload), _gib(wire), volume, *times, f"{tokens / e.step_s:,.0f}"])
    table("What it sends (GiB per rank), and how long a step takes", headings, rows)
    for e in estimates:
        if e.books.world_size > 1:
            wrapped(f"{e.strategy:<6}", explain_volume(e.books))
    print()
    assumed = f"{MFU:.0%} of the peak rate in bf16 and {LATENCY * 1e6:.0f} µs per collective"
    wrapped("", f"Times assume {assumed}: they rank strategies.")
    wrapped("", "Not in the memory: the CUDA context, NCCL's buffers, fragmentation.")
    print()


def _sweep(config: Config, gpu: Gpu, arguments: argparse.Namespace) -> int:
    totals: dict[int, dict[str, int]] = {}
    refused, kernels = "", kernels_for(config, gpu, arguments)
    for world in (2**i for i in range(11)):
        try:
            stages = planned(config, arguments, world, kernels=kernels)
        except ValueError as error:
            refused = str(error)
            break
        estimates = [estimate(stages, name, world, arguments.precision, gpu) for name in catalogue.spread()]
        totals[world] = {e.strategy: e.total for e in estimates}
    if arguments.json:
        print(json.dumps({"schema": 1, "gpu": dataclasses.asdict(gpu), "totals": totals, "refused": refused or None}))
        return 0
    _headline(config, gpu, arguments, [])
    rows = [
        [str(world), *(f"{_gib(held[s])}{' ' if held[s] <= gpu.memory else '!'}" for s in catalogue.spread())]
        for world, held in totals.items()
    ]
    table("GiB of the fullest GPU by number of ranks (! does not fit)", ["ranks", *catalogue.spread()], rows)
    if refused:
        wrapped("No more ranks:", refused)
    return 0


def wrapped(label: str, text: str) -> None:
    """A paragraph behind a label, within 100 columns."""
    start = f"  {label} " if label else "  "
    print(textwrap.fill(text, 98, initial_indent=start, subsequent_indent=" " * len(start)))


def _court(config: Config, arguments: argparse.Namespace) -> int:
    from strategies.forecast.court import Testimony, hear

    adamw = dataclasses.replace(config, optimizer=OptimizerConfig(name="adamw"))
    shapes = parameter_shapes(config.model)
    testimonies = hear(shapes, parameter_groups(adamw), arguments.world, largest_layer(shapes))
    if arguments.simulate:
        from shardrun.plan.simulation import model_states

        testimonies.append(
            Testimony(
                "simulated",
                "shardrun plan --court --simulate",
                {name: model_states(adamw, name, arguments) for name in catalogue.spread()},
                "what the engines themselves hold on the fullest rank, on tensors without data.",
            )
        )
    if arguments.json:
        print(json.dumps({"schema": 1, "testimonies": [dataclasses.asdict(t) for t in testimonies]}))
        return 0
    psi = sum(map(_numel, shapes.values()))
    unit, size = ("GiB", GIB) if psi > 1e8 else ("MiB", 2**20)
    print(f"{psi / 1e6:,.1f}M parameters, AdamW, bf16, {arguments.world} GPUs: model states alone, {unit} per GPU\n")
    figures = [[t.bytes[name] for name in catalogue.spread()] for t in testimonies]
    cells = [["–" if figure is None else f"{figure / size:,.2f}" for figure in row] for row in figures]
    rows = [[t.who, *row] for t, row in zip(testimonies, cells, strict=True)]
    table("", ["estimator", *catalogue.spread()], rows)
    for t in testimonies:
        wrapped(f"{t.who}:", f"{t.why} [{t.source}]")
    wrapped("Measured:", "--simulate adds what the engines hold; python -m benchmarks.court asks real ranks.")
    return 0


def largest_layer(shapes: dict[str, tuple[int, ...]]) -> int:
    """Elements of the largest of a block and the embedding, which DeepSpeed's estimator asks for."""
    block = sum(_numel(shape) for name, shape in shapes.items() if name.startswith("blocks.0."))
    return max(block, _numel(shapes["embed.weight"]))


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
