"""`shardrun explain CONFIG`: what an accelerate config resolves to, every key of it and of the files that it names."""

import argparse
import textwrap
from pathlib import Path

from shardrun.configs import resolve_config
from shardrun.launch import find_config, shipped_names, shown
from strategies import strict_json
from strategies.config_file import Asked

COLUMNS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a file, or the name of a shipped config such as cpu/zero2")
    parser.add_argument("--path", action="store_true", help="print only the file's path, for accelerate launch")
    parser.add_argument("--json", action="store_true", help="print JSON")


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
    if arguments.json:
        content = {"schema": 2, **vars(found), "path": str(path)}
        content["asks"] = {name: said.value for name, said in found.asks.items()}
        content["lines"] = [dict(zip(("key", "value", "effect"), line, strict=True)) for line in found.lines]
        print(strict_json.dumps(content, indent=2))
        return 0
    where = "CPU, gloo" if found.cpu else "GPU, NCCL"
    ranks = f"{found.world_size} rank{'s' if found.world_size > 1 else ''}"
    print(f"{path}\n→ {found.strategy} on {ranks} ({where}) in {found.precision}\n")
    for line in found.lines:
        print(in_columns(*line, width=max(len(key) for key, _, _ in found.lines)))
    asks = [f"{OPTIONS[name]} {said.value}" for name, said in found.asks.items()]
    if asks:
        print(textwrap.fill(f"The trainer takes over: {', '.join(asks)}.", COLUMNS, initial_indent="\n"))
    print(f"\n{command(found, path)}")
    return 0


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
    """A key's line within COLUMNS; what does not fit goes on below, and nothing is cut off."""
    width = min(width, 44)
    start = f"  {key:<{width}}  {value:<10}  "
    if len(start) > 64:  # a long key or value has the line for itself
        start = " " * 8
        first = textwrap.fill(f"{key}  {value}", COLUMNS, initial_indent="  ", subsequent_indent="  ")
        return f"{first}\n" + textwrap.fill(effect, COLUMNS, initial_indent=start, subsequent_indent=start)
    return textwrap.fill(effect, COLUMNS, initial_indent=start, subsequent_indent=" " * len(start))


def command(found: Asked, path: Path) -> str:
    """What runs the config here, as it can be typed; where this machine has no GPU, its sister for a CPU."""
    from shardrun.doctor.gpu import read_driver

    if found.cpu or read_driver(timeout=5).gpus:
        return f"Run it here:\n  {shown(path, 'speedrun.train', ['tiny'])}"
    names = (f"cpu/{path.stem}", f"cpu/{found.strategy}")
    sister = next(name for name in names if name in shipped_names())
    return (
        "It is for GPUs, and this machine shows none. There it runs with\n"
        f"  {shown(path, 'speedrun.train', ['tiny'])}\n"
        f"The same strategy runs here with\n  {shown(find_config(sister), 'speedrun.train', ['tiny'])}"
    )
