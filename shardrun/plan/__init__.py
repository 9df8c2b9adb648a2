"""`shardrun plan`: predicted memory, traffic and step time of every strategy: what fits, and what it costs.

Plain arithmetic: nothing is allocated, started or downloaded, and torch is not loaded (but for --court and --simulate).
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from shardrun.answers import json_answer
from shardrun.configs import resolve_config
from shardrun.fields import add_fields
from shardrun.launch import find_config
from shardrun.plan import fit, money, show
from shardrun.plan.estimates import Estimate, configure, estimate, fullest, inputs, kernels_for, planned
from shardrun.plan.options import add_shape
from shardrun.tables import gib, paragraph, table, wrapped
from speedrun.books.forward_pass import compute_precision
from speedrun.config import Config
from speedrun.presets import PRESETS
from speedrun.run.asked import honoured, options_said
from strategies import catalogue
from strategies.config_keys import Said
from strategies.errors import UserError
from strategies.ledger.hardware import GIB, Gpu, find_gpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "preset",
        nargs="?",
        help=f"{', '.join(PRESETS)}: the trainer's own run of it, in the stage that needs most memory (default: "
        "speedrun). With --params or a shape, only the preset's other settings are used (default: modern)",
    )
    add_shape(parser)
    parser.add_argument("--config", help="plan what this accelerate config says, with its ranks and precision, alone")
    parser.add_argument("--world", type=int, default=8, help="ranks (default: 8)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: bf16")
    parser.add_argument(
        "--fit",
        action="store_true",
        help="the largest micro-batch of every strategy and checkpointing, and what is best",
    )
    parser.add_argument(
        "--price",
        help="of a GPU for an hour: 2.49, 2.49USD or 210INR (default: a dated table). Hours and money are those of the "
        "preset's steps, or of a budget such as --tokens 10B",
    )
    parser.add_argument("--sweep", action="store_true", help="totals for 1, 2, 4 … 1024 ranks")
    parser.add_argument("--court", action="store_true", help="what public estimators say, and why they differ")
    parser.add_argument("--simulate", action="store_true", help="run the engines themselves, on tensors without data")
    parser.add_argument("--rank", type=int, default=0, help="with --simulate: which rank (default: 0)")
    parser.add_argument("--strategies", help="with --simulate: comma-separated (default: all that fit the ranks)")
    parser.add_argument("--largest", type=int, default=6, help="with --simulate: lines per peak (default: 6)")
    parser.add_argument("--why", action="store_true", help="add where the figures come from")
    parser.add_argument("--json", action="store_true", help="print JSON (docs/json.md)")
    add_fields(parser)


def run(arguments: argparse.Namespace) -> int:
    engine: dict[str, Any] | None = None
    names: Sequence[str] = ()
    asks: Mapping[str, Said] = {}
    if arguments.config:
        if arguments.court or arguments.simulate or arguments.sweep or arguments.fit:
            raise UserError("--config plans one config; leave out --court, --simulate, --sweep or --fit.")
        resolved = resolve_config(find_config(arguments.config))
        arguments.world, arguments.precision = resolved.world_size, resolved.precision
        names, engine, asks = [resolved.strategy], resolved.engine, resolved.asks
    config = honoured(configure(arguments), asks, arguments.world, options_said(arguments.fields))
    gpu = find_gpu(arguments.gpu)
    if arguments.court:
        from shardrun.plan.court import hold_court

        return hold_court(config, arguments)
    if arguments.simulate and not arguments.fit:
        from shardrun.plan import simulation

        return simulation.run(config, gpu, arguments)
    if arguments.sweep:
        return _sweep(config, gpu, arguments)
    price = money.asked(gpu, arguments)
    if arguments.fit:
        return fit.run(config, gpu, arguments, price)
    stages = planned(config, arguments, arguments.world, kernels_for(config, gpu, arguments))
    names = names or catalogue.spread(arguments.world)
    estimates = [estimate(stages, name, arguments.world, arguments.precision, gpu, engine) for name in names]
    trainings = [money.training(stages, e, gpu, price) for e in estimates]
    said = advice(estimates)
    if arguments.json:
        rows = [_row(e) | each.as_dict() for e, each in zip(estimates, trainings, strict=True)]
        print(
            json_answer(
                "plan",
                {**inputs(config, gpu, arguments), **money.as_input(price)},
                said,
                show.notes(estimates),
                estimates=rows,
            )
        )
        return 0
    for line in said:
        paragraph(line)
    print()
    show.headline(config, gpu, arguments, estimates)
    show.memory(estimates)
    show.moments(estimates)
    show.traffic(estimates)
    money.show(price, estimates, trainings)
    show.beside(estimates)
    for found in estimates:
        show.say_not_predicted(found.books)
    if arguments.why:
        show.why(estimates)
    else:
        paragraph("Where the figures come from: --why. The largest micro-batch that fits: --fit.")
    return 0


def advice(estimates: list[Estimate]) -> list[str]:
    """The quickest that fits and the one with most room, or what to do where none fits: at most three sentences."""
    fitting = [e for e in estimates if e.fits]
    if not fitting:
        least = min(estimates, key=lambda e: e.total)
        return [
            f"Nothing fits: {least.strategy} comes closest and lacks {-least.spare / GIB:.1f} GiB.",
            "Try more ranks, a smaller --micro-batch, or --checkpointing block.",
        ]
    best = min(fitting, key=lambda e: (round(e.step_s, 4), e.total))
    roomy = min(fitting, key=lambda e: e.total)
    lines = [f"Advice: {best.strategy} fits with {best.spare / GIB:.1f} GiB to spare and has the shortest step."]
    if roomy.strategy != best.strategy:
        lines.append(f"{roomy.strategy} leaves {roomy.spare / GIB:.1f} GiB for a larger micro-batch.")
    if best.tight:
        lines.append(f"{best.strategy} is tight: within the margin of its total it may not fit.")
    return lines


def _row(e: Estimate) -> dict[str, Any]:
    apart = ("planned", "books", "traffic", "shares")
    row = {field.name: getattr(e, field.name) for field in dataclasses.fields(e) if field.name not in apart}
    traffic = [dataclasses.asdict(entry) for entry in e.traffic]
    names = {"strategy": e.strategy, "world_size": e.books.world_size, "parameters": e.books.parameters}
    return {
        **names,
        **e.planned.as_dict(),
        "predicted_for": {**e.planned.about_kernels, "precision": compute_precision(e.books)},
        "engine": e.books.engine,
        **row,
        "total": e.total,
        "total_range": show.total_range(e),
        "fits": e.fits,
        "tight": e.tight,
        "step_s": e.step_s,
        "step_range_s": list(e.step_range_s),
        "tokens_per_s": e.tokens_per_s,
        "traffic": traffic,
    }


def _sweep(config: Config, gpu: Gpu, arguments: argparse.Namespace) -> int:
    totals: dict[int, dict[str, int]] = {}
    refused, kernels = "", kernels_for(config, gpu, arguments)
    for world in (2**i for i in range(11)):
        try:
            stages = planned(config, arguments, world, kernels=kernels)
        except ValueError as error:
            refused = str(error)
            break
        held = {name: fullest(stages, name, world, arguments.precision)[2] for name in catalogue.spread(world)}
        totals[world] = {name: sum(memory.values()) for name, memory in held.items()}
    first = next((world for world, held in totals.items() if any(size <= gpu.memory for size in held.values())), None)
    said = ["Nothing fits on any number of ranks: try a smaller --micro-batch, or --checkpointing block."]
    if first is not None:
        least = min(totals[first], key=totals[first].__getitem__)
        said = [f"Advice: {first} rank{'s' * (first > 1)} are the fewest that fit, under {least}."]
    if arguments.json:
        told = {**inputs(config, gpu, arguments), "world_size": list(totals)}
        print(json_answer("plan", told, said, [], totals=totals, refused=refused or None))
        return 0
    for line in said:
        paragraph(line)
    print()
    show.headline(config, gpu, arguments, [])
    columns = [name for name in catalogue.names() if any(name in held for held in totals.values())]
    rows = [
        [
            str(world),
            *(f"{gib(held[s])}{' ' if held[s] <= gpu.memory else '!'}" if s in held else "– " for s in columns),
        ]
        for world, held in totals.items()
    ]
    table("GiB of the fullest GPU by number of ranks (! does not fit)", ["ranks", *columns], rows)
    if refused:
        wrapped("No more ranks:", refused)
    return 0
