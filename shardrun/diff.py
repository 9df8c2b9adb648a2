"""`shardrun diff A B`: two accelerate configs, in bytes per rank and traffic, not in keys."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shardrun.configs import resolve_config
from shardrun.fields import add_fields, with_fields
from shardrun.launch import find_config
from shardrun.plan.estimates import COLUMNS, Planned, fullest, host_memory, kernels_line, planned, say_not_predicted
from shardrun.tables import wrapped
from speedrun.books.forward_pass import compute_precision
from speedrun.books.kernels import CPU, Kernels, installed_torch, kernels_on_gpu
from speedrun.config import Config
from speedrun.optim.policy import check_optimizer
from speedrun.presets import PRESETS
from speedrun.run.asked import honoured, options_said
from speedrun.wiring import check_fp8, check_model
from strategies import catalogue, strict_json
from strategies.config_file import Asked
from strategies.errors import UserError
from strategies.forecast.traffic import explain_volume, paper_volumes, predict_traffic
from strategies.ledger.hardware import GPUS
from strategies.ledger.terms import Scenario

MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="an accelerate config: a file, or a shipped name such as ddp or cpu/zero2")
    parser.add_argument("b", help="another one, to compare it with")
    parser.add_argument("--preset", default="gpt2", choices=PRESETS, help="the model (default: gpt2)")
    parser.add_argument("--micro-batch", type=int, help="rows of one forward pass at most (default: the preset's)")
    parser.add_argument(
        "--accumulation",
        type=int,
        help="micro-batches of a step (default: what the preset's batch and micro-batch make). Both together set the "
        "batch: micro-batch × accumulation × ranks",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_fields(parser)


def run(arguments: argparse.Namespace) -> int:
    sides = [resolve_config(find_config(path)) for path in (arguments.a, arguments.b)]
    found = [_planned(side, arguments) for side in sides]
    if arguments.json:
        rows = [_as_dict(side, *each) for side, each in zip(sides, found, strict=True)]
        print(strict_json.dumps({"schema": 1, "preset": arguments.preset, "sides": rows}))
        return 0
    stages, books, held = zip(*found, strict=True)
    _print(arguments.preset, sides, stages, books, held)
    return 0


def _planned(side: Asked, arguments: argparse.Namespace) -> tuple[Planned, Scenario, dict[str, int]]:
    config = with_fields(PRESETS[arguments.preset][1], arguments.preset, arguments)
    check_model(config.model)
    check_optimizer(config.optimizer)
    config = honoured(config, side.asks, side.world_size, options_said(arguments.fields))
    stages = planned(config, arguments, side.world_size, _kernels(side, config))
    return fullest(stages, side.strategy, side.world_size, side.precision, side.engine)


def _kernels(side: Asked, config: Config) -> Kernels:
    """A GPU is taken for an H100."""
    if side.cpu:
        check_fp8(config.model, side.precision)
        if config.model.kernels == "triton":
            raise UserError("model.kernels is triton, but the run computes on cpu: use model.kernels torch or auto.")
        return replace(CPU, asked=config.model.attention)
    return kernels_on_gpu(GPUS["h100"].capability, installed_torch(), config.model, side.precision)


def _print(
    preset: str,
    sides: Sequence[Asked],
    stages: Sequence[Planned],
    books: Sequence[Scenario],
    held: Sequence[dict[str, int]],
) -> None:
    a, b = (f"{side.strategy} ×{side.world_size} {side.precision}" for side in sides)
    if a == b:  # the files differ in something else
        a, b = ((side.path.stem if side.path else side.strategy)[:15] for side in sides)
    for rows in dict.fromkeys(map(str, stages)):
        print(f"{preset}, {rows}")
    for side, stage, book in zip(sides, stages, books, strict=True):
        wrapped(f"{side.strategy}:", f"{kernels_line(stage)}, {compute_precision(book)}")
    print("MiB per rank at the peak\n")
    print(f"{'':<18}{a:>15}{b:>16}{'change':>10}  why (in {sides[1].strategy})")
    same = []
    for category in COLUMNS:
        before, after = (side.get(category, 0) for side in held)
        if before == after:
            same += [category] if before else []
            continue
        print(
            f"{category:<18}{before / MIB:>15,.1f}{after / MIB:>16,.1f}{(after - before) / MIB:>+10,.1f}  "
            f"{_why(category, sides[1].strategy, books[1].accumulation, after)}"
        )
    before, after = (sum(side.values()) for side in held)
    print(f"{'total':<18}{before / MIB:>15,.1f}{after / MIB:>16,.1f}{(after - before) / MIB:>+10,.1f}")
    before, after = (sum(host_memory(book).values()) for book in books)
    if before or after:
        row = f"{before / MIB:>15,.1f}{after / MIB:>16,.1f}{(after - before) / MIB:>+10,.1f}"
        print(f"{'on the host':<18}{row}  offloaded: no GPU holds it")
    traffic = [predict_traffic(book) for book in books]
    sent = [sum(entry.ring_bytes for entry in entries) / MIB for entries in traffic]
    print(f"{'sent per step':<18}{sent[0]:>15,.1f}{sent[1]:>16,.1f}{sent[1] - sent[0]:>+10,.1f}  on a ring")
    if same:
        print(f"the same: {', '.join(same)}")
    for side, book, entries in zip(sides, books, traffic, strict=True):
        if book.world_size > 1:
            volume = paper_volumes(entries, book.parameters)["total"]
            wrapped(f"{side.strategy} sends {volume:.2f}Ψ:", explain_volume(book))
        say_not_predicted(book)


def _why(category: str, strategy: str, accumulation: int, held: int) -> str:
    if not held and category in ("gradients", "buffers"):
        return "none yet at the peak"
    if category == "overhead":
        return "cuBLAS's workspaces, rounding"
    waiting = category == "gradients" and accumulation > 1
    return catalogue.books(strategy).words["waiting" if waiting else category]


def _as_dict(side: Asked, planned: Planned, books: Scenario, held: dict[str, int]) -> dict[str, Any]:
    entries = predict_traffic(books)
    return {
        "config": str(side.path),
        "strategy": side.strategy,
        "world_size": side.world_size,
        "precision": side.precision,
        **planned.as_dict(),
        "predicted_for": {**planned.about_kernels, "precision": compute_precision(books)},
        "memory": held,
        "ring_bytes": sum(entry.ring_bytes for entry in entries),
        "volumes": paper_volumes(entries, books.parameters),
    }
