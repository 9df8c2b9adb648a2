"""`shardrun explain CONFIG`: what an accelerate config resolves to, every key of it and of the files that it names."""

import argparse
import dataclasses
from pathlib import Path

from shardrun.answers import json_answer
from shardrun.configs import resolve_config
from shardrun.launch import find_config, shipped_names, shown
from shardrun.tables import fill, paragraph
from shardrun.tables import width as columns
from speedrun.books.shapes import scenario_of
from speedrun.presets import PRESETS
from strategies import catalogue
from strategies.config_file import Asked
from strategies.ledger.terms import Resolved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a file, or the name of a shipped config such as cpu/zero2")
    parser.add_argument("--path", action="store_true", help="print only the file's path, for accelerate launch")
    parser.add_argument(
        "--preset", default="speedrun", choices=PRESETS, help="the model that sizes are of (default: speedrun)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (docs/json.md)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.config is None:
        print("Shipped configs (accelerate launch --config_file $(shardrun explain NAME --path) …):")
        print("\n".join(f"  {name}" for name in shipped_names()))
        return 0
    path = find_config(arguments.config)
    if arguments.path:
        print(path)
        return 0
    found = resolve_config(path)
    decisive = settings(found, arguments.preset)
    said = [advice(found)]
    if arguments.json:
        content = {name: value for name, value in vars(found).items() if name not in ("path", "asks", "lines")}
        content["asks"] = {name: each.value for name, each in found.asks.items()}
        content["lines"] = [dict(zip(("key", "value", "effect"), line, strict=True)) for line in found.lines]
        content["settings"] = [each._asdict() for each in decisive]
        inputs = {"accelerate_config": str(path), "preset": arguments.preset}
        inputs["config"] = dataclasses.asdict(PRESETS[arguments.preset][1])
        print(json_answer("explain", inputs, said, [], path=str(path), **content))
        return 0
    where = "CPU, gloo" if found.cpu else "GPU, NCCL"
    ranks = f"{found.world_size} rank{'s' if found.world_size > 1 else ''}"
    print(path)
    print(f"→ {found.strategy} on {ranks} ({where}) in {found.precision}")
    paragraph(said[0])
    print()
    for line in found.lines:
        print(in_columns(*line, width=max(len(key) for key, _, _ in found.lines)))
    if decisive:
        print()
        paragraph(f"What decides memory, with {arguments.preset}'s model (• the config says it, else a default):")
        longest = max(len(each.key) for each in decisive) + 2
        for each in decisive:
            print(in_columns(f"{'•' if each.said else ' '} {each.key}", each.value, each.effect, longest))
    asks = [f"{OPTIONS[name]} {each.value}" for name, each in found.asks.items()]
    if asks:
        print()
        paragraph(f"The trainer takes over: {', '.join(asks)}.")
    print(f"\n{command(found, path)}")
    return 0


def settings(found: Asked, preset: str) -> list[Resolved]:
    """The engine's settings that decide memory, resolved for a preset's model."""
    config = PRESETS[preset][1]
    run = scenario_of(config, found.strategy, found.world_size, found.precision, engine=found.engine)
    return catalogue.books(found.strategy).settings(run)


def advice(found: Asked) -> str:
    """What of the config does nothing, or that all of it counts."""
    idle = [key for key, _, effect in found.lines if "without effect" in effect]
    if idle:
        return f"Without effect, and may go: {', '.join(idle)}."
    return "Every key of it has an effect."


OPTIONS = {
    "clip": "--optimizer.clip",
    "accumulation": "micro-batches per step",
    "checkpointing": "--model.checkpointing",
    "compile": "--compile",
    "global_batch": "--data.global-batch",
    "micro_batch": "--data.micro-batch",
}
"""What a config can ask of the trainer (strategies.config_file.Asked) → its option there."""


def in_columns(key: str, value: str, effect: str, width: int) -> str:
    """A key's line within the terminal; what does not fit goes on below, and nothing is cut off."""
    width, room = min(width, 44), columns()
    start = f"  {key:<{width}}  {value:<10}  "
    if len(start) > room * 2 // 3:  # a long key or value has the line for itself
        start = " " * 8
        return "\n".join((fill(f"{key}  {value}", "  ", "  "), fill(effect, start, start)))
    return fill(effect, start, " " * len(start))


def command(found: Asked, path: Path) -> str:
    """What runs the config here, as it can be typed; where this machine has no GPU, its sister for a CPU."""
    from shardrun.doctor.gpu import read_driver

    ours = typed(shown(path, "speedrun.train", ["tiny"]))
    if found.cpu or read_driver(timeout=5).gpus:
        return f"Run it here:\n{ours}"
    names = (f"cpu/{path.stem}", f"cpu/{found.strategy}")
    sister = next(name for name in names if name in shipped_names())
    theirs = typed(shown(find_config(sister), "speedrun.train", ["tiny"]))
    return (
        f"It is for GPUs, and this machine shows none. There it runs with\n{ours}\nThe same strategy runs here with\n"
        f"{theirs}"
    )


def typed(line: str) -> str:
    """A command that can be copied; where it is longer than the terminal is wide, in two lines."""
    if len(line) + 2 > columns():
        line = line.replace(" -m ", " \\\n    -m ", 1)
    return f"  {line}"
