"""Whole runs of the trainer inside a pool's ranks: everything but the launching, without its seconds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from speedrun.config import Config, DataConfig, ModelConfig
from speedrun.train import train
from strategies import catalogue
from strategies.base import Precision
from strategies.select import Launch
from tests.strategies.small import allow_fp16

STRATEGIES = catalogue.spread()


def small(**fields: Any) -> Config:
    """A run of a few milliseconds a step on the embedded corpus; sizes that do not divide by 2 or 3."""
    defaults: dict[str, Any] = {
        "model": ModelConfig(layers=2, heads=3, width=48, mlp_width=101, max_sequence_length=64),
        "data": DataConfig(sequence_length=32, global_batch=12, eval_tokens=320),
        "steps": 4,
        "eval_every": 2,
        "untimed_steps": 0,
        "name": "run",
        "progress": "none",
    }
    return Config(**{**defaults, **fields})


def launch_of(strategy: str, rank: int = 0, world_size: int = 1, precision: Precision = "fp32") -> Launch:
    """What select.launched() returns for one of the shipped CPU configs."""
    engine: dict[str, Any] = {}
    if strategy == "fsdp":
        engine = {"reshard_after_forward": True, "wrap": ["Block"]}
    if strategy.startswith("zero"):
        if precision == "fp16":
            allow_fp16()
        engine = {"zero_optimization": {"stage": int(strategy[-1])}}
    return Launch(strategy, rank, rank, world_size, world_size, precision, True, engine)


def train_here(strategy: str, config: Config, precision: Precision = "fp32") -> None:
    """On a rank: the run under that strategy over all ranks of this process's group (single: on each, by itself)."""
    rank, world_size = (0, 1) if strategy == "single" else (dist.get_rank(), dist.get_world_size())
    train("small", config, launch_of(strategy, rank, world_size, precision))


def in_folder(config: Config, folder: Path) -> Config:
    return dataclasses.replace(config, out=str(folder))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """A run's lines, in order."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path from there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
