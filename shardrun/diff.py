"""`shardrun diff A B`: two accelerate configs, in bytes per rank and traffic, not in keys."""

import argparse
import json
from typing import Any

from shardrun.configs import Resolved, resolve
from shardrun.launch import find_config
from shardrun.plan import COLUMNS, books_of, memory_of, wrapped
from speedrun.config import PRESETS, Config
from strategies.ledger.predict import Run
from strategies.ledger.traffic import explain_volume, paper_volumes, predict_traffic

MIB = 2**20

WHY = {
    "parameters": {
        "single": "whole, float32",
        "ddp": "whole, float32 (autocast casts for use)",
        "fsdp": "float32 rows, gathered for use",
        "zero1": "whole, in the compute dtype",
        "zero2": "whole, in the compute dtype",
        "zero3": "equal cuts, gathered for use",
    },
    "master parameters": {
        "single": "none: the parameters are float32",
        "ddp": "none: the parameters are float32",
        "fsdp": "none: the shards are float32",
        "zero1": "this rank's slice in float32",
        "zero2": "this rank's slice in float32",
        "zero3": "this rank's cuts in float32",
    },
    "gradients": {
        "single": "whole, float32",
        "ddp": "whole, float32, in the buckets",
        "fsdp": "float32 rows",
        "zero1": "what its slice needs, after the last",
        "zero2": "what its slice needs, after each pass",
        "zero3": "its cuts, in a buffer that stays",
    },
    "optimizer states": {
        "single": "all",
        "ddp": "all of AdamW's; Muon's if it owns them",
        "fsdp": "for its rows",
        "zero1": "for its slice",
        "zero2": "for its slice",
        "zero3": "for its cuts",
    },
    "activations": dict.fromkeys(("single", "ddp"), "under autocast")
    | dict.fromkeys(("fsdp", "zero1", "zero2", "zero3"), "in the compute dtype"),
    "buffers": {
        "single": "none",
        "ddp": "none beside the gradients",
        "fsdp": "two gathered blocks, one's gradients",
        "zero1": "the reduce bucket",
        "zero2": "the reduce bucket",
        "zero3": "the reduce bucket, gathered parameters",
    },
}
"""Category → strategy → what a rank keeps of it, in a few words."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="an accelerate config: a file, or a shipped name such as ddp or cpu/zero2")
    parser.add_argument("b", help="another")
    parser.add_argument("--preset", default="gpt2", choices=PRESETS, help="the model (default: gpt2)")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of one forward pass (default: 8)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    if arguments.micro_batch < 1 or arguments.accumulation < 1:
        raise ValueError("--micro-batch and --accumulation are at least 1.")
    config = PRESETS[arguments.preset][1]
    sides = [resolve(find_config(path)) for path in (arguments.a, arguments.b)]
    books = [
        books_of(config, side.strategy, side.world_size, side.precision, arguments.accumulation, side.engine)
        for side in sides
    ]
    held = [memory_of(config, book, arguments.micro_batch) for book in books]
    if arguments.json:
        rows = [_as_dict(*each) for each in zip(sides, books, held, strict=True)]
        print(json.dumps({"schema": 1, "sides": rows}))
        return 0
    _print(sides, books, held, config, arguments)
    return 0


def _print(
    sides: list[Resolved], books: list[Run], held: list[dict[str, int]], config: Config, arguments: argparse.Namespace
) -> None:
    a, b = (f"{side.strategy} ×{side.world_size} {side.precision}" for side in sides)
    print(f"{arguments.preset}, {arguments.micro_batch} rows of {config.data.sequence_length} tokens: MiB per rank\n")
    print(f"{'':<18}{a:>15}{b:>16}{'change':>10}  why (in {sides[1].strategy})")
    same = []
    for category in COLUMNS:
        before, after = (side.get(category, 0) for side in held)
        if before == after:
            same += [category] if before else []
            continue
        print(
            f"{category:<18}{before / MIB:>15,.1f}{after / MIB:>16,.1f}{(after - before) / MIB:>+10,.1f}  "
            f"{WHY[category][sides[1].strategy]}"
        )
    before, after = (sum(side.values()) for side in held)
    print(f"{'total':<18}{before / MIB:>15,.1f}{after / MIB:>16,.1f}{(after - before) / MIB:>+10,.1f}")
    traffic = [predict_traffic(book) for book in books]
    sent = [sum(entry.ring_bytes for entry in entries) / MIB for entries in traffic]
    print(f"{'sent per step':<18}{sent[0]:>15,.1f}{sent[1]:>16,.1f}{sent[1] - sent[0]:>+10,.1f}  on a ring")
    if same:
        print(f"the same: {', '.join(same)}")
    for side, book, entries in zip(sides, books, traffic, strict=True):
        if book.world_size > 1:
            volume = paper_volumes(entries, book.parameters)["total"]
            wrapped(f"{side.strategy} sends {volume:.2f}Ψ:", explain_volume(book))


def _as_dict(side: Resolved, books: Run, held: dict[str, int]) -> dict[str, Any]:
    entries = predict_traffic(books)
    return {
        "config": str(side.path),
        "strategy": side.strategy,
        "world_size": side.world_size,
        "precision": side.precision,
        "memory": held,
        "ring_bytes": sum(entry.ring_bytes for entry in entries),
        "volumes": paper_volumes(entries, books.parameters),
    }
