"""`shardrun explain CONFIG`: what an accelerate config resolves to, key by key, ignored keys named."""

import argparse
import json

from shardrun.configs import resolve_config
from shardrun.launch import find_config, shipped_names


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
    resolved = resolve_config(path)
    if arguments.json:
        content = {"schema": 1, **vars(resolved), "path": str(path)}
        content["lines"] = [dict(zip(("key", "value", "effect"), line, strict=True)) for line in resolved.lines]
        print(json.dumps(content, indent=2))
        return 0
    where = "CPU, gloo" if resolved.cpu else "GPU, NCCL"
    ranks = f"{resolved.world_size} rank{'s' if resolved.world_size > 1 else ''}"
    print(f"{path}\n→ {resolved.strategy} on {ranks} ({where}) in {resolved.precision}\n")
    width = max(len(key) for key, _, _ in resolved.lines)
    for key, value, effect in resolved.lines:
        print(f"  {key:<{width}}  {value:<24}{effect}" if len(value) < 24 else f"  {key:<{width}}  {value}  {effect}")
    return 0
