"""`shardrun diff A B`: two accelerate configs, in bytes per rank and traffic, not in keys."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardrun.answers import json_answer
from shardrun.configs import resolve_config
from shardrun.fields import add_fields
from shardrun.launch import find_config
from shardrun.plan.estimates import (
    COLUMNS,
    Planned,
    configure,
    fullest,
    host_memory,
    inputs,
    kernels_for,
    kernels_line,
    planned,
    preset_of,
)
from shardrun.plan.options import add_shape
from shardrun.plan.show import say_not_predicted
from shardrun.tables import paragraph, table, wrapped
from speedrun.books.forward_pass import compute_precision
from speedrun.books.kernels import CPU, Kernels
from speedrun.config import Config
from speedrun.presets import PRESETS
from speedrun.run.asked import honoured, options_said
from speedrun.wiring import check_fp8
from strategies import catalogue
from strategies.config_file import Asked
from strategies.errors import UserError
from strategies.forecast.traffic import explain_volume, paper_volumes, predict_traffic
from strategies.ledger.hardware import GIB, MARGIN, OUTSIDE, find_gpu
from strategies.ledger.terms import Entry, Scenario


@dataclass(frozen=True)
class Side:
    """One of the two configs. Bytes are of the rank that holds most."""

    asked: Asked
    config: Config
    planned: Planned
    books: Scenario
    held: dict[str, int]

    @property
    def traffic(self) -> list[Entry]:
        return predict_traffic(self.books)

    @property
    def total(self) -> int:
        return sum(self.held.values())

    @property
    def sent(self) -> float:
        """Bytes on the wire of a ring in one step."""
        return sum(entry.ring_bytes for entry in self.traffic)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="an accelerate config: a file, or a shipped name such as ddp or cpu/zero2")
    parser.add_argument("b", help="another one, to compare it with")
    parser.add_argument(
        "--preset",
        help=f"{', '.join(PRESETS)} (default: speedrun). With --params or a shape, only its other settings are used "
        "(default: modern)",
    )
    add_shape(parser)
    parser.add_argument("--why", action="store_true", help="add where the figures come from")
    parser.add_argument("--json", action="store_true", help="print JSON (docs/json.md)")
    add_fields(parser)


def run(arguments: argparse.Namespace) -> int:
    asked = [resolve_config(find_config(path)) for path in (arguments.a, arguments.b)]
    sides = [_side(each, arguments) for each in asked]
    said, notes = advice(sides), _notes(sides)
    if arguments.json:
        print(json_answer("diff", _inputs(sides, arguments), said, notes, sides=[_as_dict(side) for side in sides]))
        return 0
    for line in said:
        paragraph(line)
    print()
    _print(preset_of(arguments), sides)
    if arguments.why:
        for note in notes:
            wrapped("", note)
    else:
        paragraph("Where the figures come from: --why.")
    return 0


def _side(asked: Asked, arguments: argparse.Namespace) -> Side:
    its = argparse.Namespace(**{**vars(arguments), "world": asked.world_size, "rank": 0, "precision": asked.precision})
    config = honoured(configure(its), asked.asks, asked.world_size, options_said(arguments.fields))
    stages = planned(config, its, asked.world_size, _kernels(asked, config, its))
    return Side(asked, config, *fullest(stages, asked.strategy, asked.world_size, asked.precision, asked.engine))


def _kernels(asked: Asked, config: Config, arguments: argparse.Namespace) -> Kernels:
    if asked.cpu:
        check_fp8(config.model, asked.precision)
        if config.model.kernels == "triton":
            raise UserError("model.kernels is triton, but the run computes on cpu: use model.kernels torch or auto.")
        return replace(CPU, asked=config.model.attention)
    return kernels_for(config, find_gpu(arguments.gpu), arguments)


def advice(sides: Sequence[Side]) -> list[str]:
    """What the second config changes."""
    a, b = sides
    first, second = _names(sides)
    less, sends = a.total - b.total, (a.sent - b.sent) / GIB
    size, wire = f"{abs(less) / GIB:,.2f} GiB", f"{abs(sends):,.2f} GiB"
    much = f"{size} {'less' if less > 0 else 'more'} than" if round(less / GIB, 2) else "as much as"
    wire = f"{wire} {'less' if sends > 0 else 'more'}" if round(sends, 2) else "as much"
    return [f"{second} holds {much} {first} at the peak, and sends {wire} in a step."]


def _names(sides: Sequence[Side]) -> list[str]:
    asked = [side.asked for side in sides]
    names = [f"{each.strategy} ×{each.world_size} {each.precision}" for each in asked]
    if names[0] == names[1]:  # the files differ in something else
        names = [each.path.stem[:15] if each.path else each.strategy for each in asked]
    return names


def _print(preset: str, sides: Sequence[Side]) -> None:
    a, b = sides
    for stage in dict.fromkeys(str(side.planned) for side in sides):
        paragraph(f"{preset}, {stage}")
    for side in sides:
        wrapped(f"{side.asked.strategy}:", f"{kernels_line(side.planned)}, {compute_precision(side.books)}")
    print()

    def row(what: str, before: float, after: float, why: str) -> list[str]:
        return [what, f"{before / GIB:,.2f}", f"{after / GIB:,.2f}", f"{(after - before) / GIB:+,.2f}", why]

    rows: list[list[str]] = []
    same: list[str] = []
    for category in COLUMNS:
        held, then = (side.held.get(category, 0) for side in sides)
        if held == then:
            same += [category] if held else []
        else:
            rows.append(row(category, held, then, _why(category, b, then)))
    rows.append(row("total", a.total, b.total, ""))
    on_host = [sum(host_memory(side.books).values()) for side in sides]
    if any(on_host):
        rows.append(row("on the host", on_host[0], on_host[1], "offloaded: no GPU holds it"))
    rows.append(row("sent per step", a.sent, b.sent, "on a ring"))
    headings = ["", *_names(sides), "change", f"why (in {b.asked.strategy})"]
    table("GiB per rank at the peak", headings, rows, text=True)
    if same:
        wrapped("The same:", ", ".join(same))
    for side in sides:
        say_not_predicted(side.books)


def _notes(sides: Sequence[Side]) -> list[str]:
    """Where the figures come from, in sentences."""
    lines = []
    for side in sides:
        if side.books.world_size > 1:
            volume = paper_volumes(side.traffic, side.books.parameters)["total"]
            lines.append(f"{side.asked.strategy} sends {volume:.2f}Ψ: {explain_volume(side.books)}.")
    outside = [] if all(side.asked.cpu for side in sides) else [f"Outside the allocator: {OUTSIDE}"]
    return [*dict.fromkeys(lines), MARGIN, *outside]


def _why(category: str, side: Side, held: int) -> str:
    if not held and category in ("gradients", "buffers"):
        return "none yet at the peak"
    beside = {"overhead": "cuBLAS's workspaces, rounding", "context": "of CUDA", "NCCL": "its buffers"}
    if category in beside:
        return beside[category]
    waiting = category == "gradients" and side.books.accumulation > 1
    return catalogue.books(side.asked.strategy).words["waiting" if waiting else category]


def _inputs(sides: Sequence[Side], arguments: argparse.Namespace) -> dict[str, Any]:
    """All that the figures are of; what differs between the configs stands with each."""
    its = argparse.Namespace(**{**vars(arguments), "world": None, "precision": None})
    return {
        **inputs(sides[0].config, find_gpu(arguments.gpu), its),
        "world_size": [side.asked.world_size for side in sides],
        "precision": [side.asked.precision for side in sides],
        "accelerate_config": [str(side.asked.path) for side in sides],
    }


def _as_dict(side: Side) -> dict[str, Any]:
    return {
        "config": str(side.asked.path),
        "strategy": side.asked.strategy,
        "world_size": side.asked.world_size,
        "precision": side.asked.precision,
        "engine": side.books.engine,
        **side.planned.as_dict(),
        "predicted_for": {**side.planned.about_kernels, "precision": compute_precision(side.books)},
        "memory": side.held,
        "total": side.total,
        "host": host_memory(side.books),
        "ring_bytes": side.sent,
        "volumes": paper_volumes(side.traffic, side.books.parameters),
    }
