"""The trainer's own fields on the command lines of `plan` and `diff`: `--model.fp8`, `--data.micro-batch 4`.

All of them are taken, under the trainer's names and read by the trainer's parser, so that its command line can be
planned as it is. What changes neither bytes nor time (a seed, a name) changes no figure. torch is not loaded, but where
`--data.source` asks for the vocabulary of its shards.
"""

import argparse
import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args, get_origin, get_type_hints

from speedrun.config import Config, StageConfig
from speedrun.presets import PRESETS
from speedrun.ranges import check_ranges
from speedrun.run.asked import options_said
from strategies.errors import UserError

STAGES = max(len(config.schedule.stages) for _, config in PRESETS.values())
"""Lines of the longest stage table of a preset: each line's fields are `--schedule.stages.0.micro-batch` and so on."""

OURS = {
    "layers": "model.layers",
    "width": "model.width",
    "heads": "model.heads",
    "vocab": "model.vocab_size",
    "seq": "data.sequence_length",
    "checkpointing": "model.checkpointing",
    "optimizer": "optimizer.name",
    "micro_batch": "data.micro_batch",
}
"""Plan's own options → the field that each of them is short for."""


class _Words(argparse.Action):
    """Collects what was said, as the trainer's parser wants it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        namespace.fields = [*namespace.fields, option, *values]


def parse_count(text: str, option: str, what: str, such_as: str) -> int:
    """'124M' → 124000000. Raises UserError for what is no count."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().upper())
    count = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2]] if match else 0.0
    if not 1 <= count <= 1e15:
        raise UserError(f"{option} {text!r} is no {what}; write for example {such_as}.")
    return round(count)


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Let a verb take the trainer's fields, into `fields`: words for `with_fields`."""
    group = parser.add_argument_group(
        "the trainer's fields",
        "--model.fp8, --optimizer.adamw-every 2, --data.micro-batch 4 and all others that "
        "`python -m speedrun.train PRESET --help` lists; but not --compile",
    )
    for name, hint in [*field_types(), *_stage_types()]:
        option, kind = "--" + name.replace("_", "-"), hint
        if kind is bool:
            section, _, last = option.removeprefix("--").rpartition(".")
            off = "--" + (f"{section}." if section else "") + f"no-{last}"
            group.add_argument(option, off, dest="fields", nargs=0, action=_Words, default=[], help=argparse.SUPPRESS)
            continue
        several = any(get_origin(part) is tuple for part in (kind, *get_args(kind)))
        nargs: Any = "*" if several else 1
        group.add_argument(option, dest="fields", nargs=nargs, action=_Words, default=[], help=argparse.SUPPRESS)


def field_types(kind: type[Any] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every field of a configuration, those of its sections among them; the stage table, whose
    lines have names of their own, left out."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from field_types(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif f"{prefix}{name}" != "schedule.stages":
            yield f"{prefix}{name}", hint


def _stage_types() -> Iterator[tuple[str, Any]]:
    for number in range(STAGES):
        yield from field_types(StageConfig, f"schedule.stages.{number}.")


def with_fields(config: Config, preset: str, arguments: argparse.Namespace) -> Config:
    """The configuration with the fields that were said. preset: for messages.

    Raises UserError where the trainer does not take them, a verb's own option says the same, or no figure follows them.
    """
    words = list(arguments.fields)
    if not words:
        return config
    for i, word in enumerate(words[:-1]):
        if word == "--tokens":
            words[i + 1] = str(parse_count(words[i + 1], "--tokens", "number of tokens", "2500M, 10B or 1T"))
    said = options_said(words)
    for option, field in OURS.items():
        if getattr(arguments, option, None) is not None and field in said:
            ours, theirs = (name.replace("_", "-") for name in (option, field))
            raise UserError(f"--{ours} and --{theirs} are two names of one thing: leave one of them out.")
    import tyro

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a box of lines, in place of the one below
            found = tyro.cli(Config, default=config, args=words, console_outputs=False)
    except SystemExit:
        raise UserError(
            f"{' '.join(words)} is not what the trainer takes: `python -m speedrun.train {preset} --help` lists its "
            "fields and their values."
        ) from None
    if found.compile and "compile" in said:
        raise UserError("--compile is not planned: nobody predicts what compiled blocks keep; leave it out.")
    check_ranges(found)
    if "data.source" in said and "model.vocab_size" not in said:
        from speedrun.data.vocabulary import vocabulary_of

        size = vocabulary_of(found.data.source) or found.model.vocab_size
        found = replace(found, model=replace(found.model, vocab_size=size))
    return found
