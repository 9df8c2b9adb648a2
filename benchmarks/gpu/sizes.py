"""What is trained: a preset as it is, or cut to sizes that a CPU runs in seconds; and tokens for it."""

import dataclasses
from pathlib import Path

from benchmarks.train_step import random_tokens
from speedrun.config import Config
from speedrun.presets import PRESETS

FINEWEB = Path("data/fineweb10B")

BYTES = ["--model.vocab-size", "257", "--model.pad-vocab-to", "1", "--data.source", "pydocs"]

TINY = {
    "gpt2": [
        *BYTES,
        *("--model.layers", "1", "--model.width", "32", "--model.heads", "2", "--model.max-sequence-length", "32"),
        *("--data.sequence-length", "32", "--data.global-batch", "16", "--data.micro-batch", "2"),
    ],
    "speedrun": [
        *BYTES,
        *("--model.layers", "4", "--model.value-embeddings", "1", "3", "--model.block-skip", "0", "2"),
        *("--model.backout", "2", "--model.long-layers", "1", "3", "--model.paired-head-layers", "0", "2"),
        *("--model.width", "48", "--model.bigram-rows", "1000", "--optimizer.orthogonalization-dtype", "float32"),
        *("--data.sequence-length", "32", "--data.eval-sequence-length", "32"),
        *("--data.global-batch", "16", "--data.micro-batch", "8"),
        *("--model.window-short", "8", "--model.window-long", "20"),
        *(
            word
            for stage, (rows, short, long) in enumerate([(8, 4, 8), (16, 6, 12), (0, 7, 16), (0, 0, 0)])
            for word in (
                *(f"--schedule.stages.{stage}.global-batch", str(rows)),
                *(f"--schedule.stages.{stage}.sequence-length", "16" if rows else "0"),
                *(f"--schedule.stages.{stage}.micro-batch", "8" if rows else "0"),
                *(f"--schedule.stages.{stage}.window-short", str(short)),
                *(f"--schedule.stages.{stage}.window-long", str(long)),
            )
        ),
    ],
}
"""Preset → the trainer's options that cut it. The ideas of `speedrun` and its four stages stay."""


def config_of(preset: str, tiny: bool) -> Config:
    """The preset, whole or cut."""
    if not tiny:
        return PRESETS[preset][1]
    from speedrun.run.command_line import parse

    return parse([preset, *TINY[preset]])[1]


def tokens(folder: Path, tiny: bool) -> str:
    """Where tokens are: FineWeb where it has been fetched, else shards of tokens drawn at random, made in `folder`; for
    tiny sizes bytes of text."""
    if tiny:
        return "pydocs"
    if FINEWEB.is_dir():
        return str(FINEWEB)
    random_tokens(folder / "tokens")
    return str(folder / "tokens")


def with_tokens(config: Config, source: str, tiny: bool) -> Config:
    """The config with those tokens, a few of them for validation, which says nothing here."""
    data = dataclasses.replace(config.data, source=source, eval_tokens=eval_tokens(tiny))
    return dataclasses.replace(config, data=data)


def eval_tokens(tiny: bool) -> int:
    """Targets of a validation."""
    return 512 if tiny else 65_536
