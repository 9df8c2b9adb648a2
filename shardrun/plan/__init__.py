"""`shardrun plan`: predicted memory, traffic and step time of every strategy: what fits, and what it costs.

Plain arithmetic: nothing is allocated, started or downloaded, and torch is not loaded (but for --court and --simulate).
"""

import argparse
import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from shardrun.configs import resolve_config
from shardrun.fields import add_fields
from shardrun.launch import find_config
from shardrun.plan.estimates import (
    COLUMNS,
    OVERHEAD,
    Estimate,
    configure,
    estimate,
    kernels_for,
    kernels_line,
    planned,
    preset_of,
    say_not_predicted,
)
from shardrun.tables import gib, table, wrapped
from speedrun.books.forward_pass import compute_precision
from speedrun.books.shapes import scenario_of
from speedrun.config import Config
from speedrun.presets import PRESETS
from speedrun.run.asked import honoured, options_said
from strategies import catalogue, strict_json
from strategies.config_keys import Said
from strategies.errors import UserError
from strategies.forecast.traffic import explain_volume
from strategies.ledger.hardware import GIB, LATENCY, MFU, Gpu, find_gpu


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
    parser.add_argument("--config", help="plan what this accelerate config says, with its ranks and precision, alone")
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
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: bf16")
    parser.add_argument("--checkpointing", choices=("none", "block", "selective"), help="default: the preset's")
    parser.add_argument("--sweep", action="store_true", help="totals for 1, 2, 4 … 1024 ranks")
    parser.add_argument("--court", action="store_true", help="what public estimators say, and why they differ")
    parser.add_argument("--simulate", action="store_true", help="run the engines themselves, on tensors without data")
    parser.add_argument("--rank", type=int, default=0, help="with --simulate: which rank (default: 0)")
    parser.add_argument("--strategies", help="with --simulate: comma-separated (default: all five)")
    parser.add_argument("--largest", type=int, default=6, help="with --simulate: lines per peak (default: 6)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_fields(parser)


def run(arguments: argparse.Namespace) -> int:
    engine: dict[str, Any] | None = None
    names: Sequence[str] = ()
    asks: Mapping[str, Said] = {}
    if arguments.config:
        if arguments.court or arguments.simulate or arguments.sweep:
            raise UserError("--config plans one config; leave out --court, --simulate or --sweep.")
        resolved = resolve_config(find_config(arguments.config))
        arguments.world, arguments.precision = resolved.world_size, resolved.precision
        names, engine, asks = [resolved.strategy], resolved.engine, resolved.asks
    config = honoured(configure(arguments), asks, arguments.world, options_said(arguments.fields))
    gpu = find_gpu(arguments.gpu)
    if arguments.court:
        from shardrun.plan.court import hold_court

        return hold_court(config, arguments)
    if arguments.simulate:
        from shardrun.plan import simulation

        return simulation.run(config, gpu, arguments)
    if arguments.sweep:
        return _sweep(config, gpu, arguments)
    stages = planned(config, arguments, arguments.world, kernels_for(config, gpu, arguments))
    names = names or catalogue.spread(arguments.world)
    estimates = [estimate(stages, name, arguments.world, arguments.precision, gpu, engine) for name in names]
    if arguments.json:
        settings = {
            "preset": preset_of(arguments),
            "optimizer": config.optimizer.name,
            "precision": arguments.precision,
            "checkpointing": config.model.checkpointing,
        }
        rows = [_row(e) for e in estimates]
        print(strict_json.dumps({"schema": 1, **settings, "gpu": dataclasses.asdict(gpu), "estimates": rows}))
        return 0
    _headline(config, gpu, arguments, estimates)
    _print_memory(estimates, gpu)
    _print_traffic(estimates)
    for found in estimates:
        say_not_predicted(found.books)
    print(textwrap.fill(advice(estimates), 98))
    return 0


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
        *(["host"] if any(e.host for e in estimates) else []),
    ]
    rows = []
    for e in estimates:
        filled = min(8, round(8 * e.total / gpu.memory))
        bar = "█" * filled + "·" * (8 - filled)
        spare = f"{e.spare / GIB:+,.1f}" if e.fits else f"{e.spare / GIB:,.1f} no"
        host = [gib(sum(e.host.values()))] if "host" in headings else []
        rows.append([e.strategy, *(gib(e.memory.get(c, 0)) for c in COLUMNS), gib(e.total), bar, spare, *host])
    table("What the fullest GPU holds at its peak (predicted)", headings, rows)
    for precision in dict.fromkeys(compute_precision(e.books) for e in estimates):
        names = [e.strategy for e in estimates if compute_precision(e.books) == precision]
        wrapped("", f"Activations {'in' if precision != 'autocast' else 'under'} {precision}: {', '.join(names)}.")
    wrapped("", OVERHEAD)
    if "host" in headings:
        wrapped(
            "",
            "Host: what each rank keeps in host memory; whether the GPU fits does not depend on it. Not in the times: "
            "copies over PCIe, and the optimizer's step on the CPU.",
        )
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
        rows.append([e.strategy, gib(payload), gib(wire), volume, *times, f"{tokens / e.step_s:,.0f}"])
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
        names = catalogue.spread(world)
        estimates = [estimate(stages, name, world, arguments.precision, gpu) for name in names]
        totals[world] = {e.strategy: e.total for e in estimates}
    if arguments.json:
        print(
            strict_json.dumps(
                {"schema": 1, "gpu": dataclasses.asdict(gpu), "totals": totals, "refused": refused or None}
            )
        )
        return 0
    _headline(config, gpu, arguments, [])
    columns = [name for name in catalogue.names() if any(name in held for held in totals.values())]
    rows = [
        [str(world), *(f"{gib(held[s])}{' ' if held[s] <= gpu.memory else '!'}" if s in held else "–" for s in columns)]
        for world, held in totals.items()
    ]
    table("GiB of the fullest GPU by number of ranks (! does not fit)", ["ranks", *columns], rows)
    if refused:
        wrapped("No more ranks:", refused)
    return 0
