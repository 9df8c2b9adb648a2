"""A walk over all fields of a run's configuration: does any value end in a traceback, or train on what means nothing?

    python -m benchmarks.field_walk                  # 2,200 examples, about 15 minutes on two cores
    python -m benchmarks.field_walk --examples 100 --out FILE.md
    python -m benchmarks.field_walk --examples 800 --first 5000 --add      # more of them

Each example writes one field on the trainer's command line, now and then a second: whole numbers and fractions of every
size, NaN and infinities, words, paths, other scripts, too many and too few values. The command line is read, checked
and, where it is accepted, trained for three steps on one process. Sizes that would take long are cut after the
check. An example must end in one of these ways:

- refused: one sentence, and no run's folder;
- trained: the losses are finite;
- diverged: the sentence of a loss that is not finite. Only rates and their like may do that.

Anything else is printed with its command line, and the script ends with status 1.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from speedrun.books.flops import flops
from speedrun.config import Config, StageConfig
from speedrun.ranges import hints
from speedrun.run.asked import options_said
from speedrun.run.checks import check
from speedrun.run.command_line import parse
from speedrun.run.ending import USER_ERRORS
from speedrun.stages import number_of_steps
from speedrun.train import train
from strategies.errors import UserError
from strategies.select import Launch

SINGLE = Launch("single", 0, 0, 1, 1, "fp32", True)
TINY = (
    "--model.layers=1 --model.heads=2 --model.width=32 --model.mlp-width=48 --model.bigram-rows=50 "
    "--model.trigram-rows=0 --model.fourgram-rows=0 --model.ngram-width=8 --data.eval-tokens=128 "
    "--data.sequence-length=32 --data.global-batch=4 --steps=2 --eval-every=2 --untimed-steps=0 --progress=none "
    "--name=run"
)
STAGED = (
    "--model.vocab-size=257 --model.layers=2 --model.heads=2 --model.width=32 --model.bigram-rows=50 "
    "--model.max-sequence-length=64 --model.window-short=8 --model.window-long=16 --model.pad-vocab-to=1 "
    "--model.value-embeddings 1 --model.block-skip None --model.backout=0 --model.long-layers 1 "
    "--model.paired-head-layers 0 --data.source=pydocs --data.eval-tokens=128 --data.sequence-length=32 "
    "--data.eval-sequence-length=0 --data.global-batch=4 --steps=4 --eval-every=2 --untimed-steps=0 --progress=none "
    "--name=run --schedule.stages.0.global-batch=2 --schedule.stages.0.sequence-length=16 "
    "--schedule.stages.1.global-batch=2 --schedule.stages.1.sequence-length=16 --schedule.stages.0.window-short=4 "
    "--schedule.stages.0.window-long=8 --schedule.stages.1.window-short=4 --schedule.stages.1.window-long=8 "
    "--schedule.stages.2.window-short=8 --schedule.stages.2.window-long=8"
)
"""What the presets tiny and speedrun, which has all ideas and a stage table, become in every example."""

WHOLE = [-(10**30), -(2**63), -3, -1, 0, 1, 2, 3, 4, 5, 8, 12, 31, 32, 33, 64, 999, 1000, 1001, 10**6, 10**6 + 1]
WHOLE += [10**7, 10**9, 10**9 + 1, 2**31, 2**32 - 1, 2**32, 2**63, 10**18, 10**30, 10**5000]
FRACTIONS = [0.0, -0.0, 1.0, 0.5, 2.0, 1e-3, 1e-8, 1e-30, 1e-38, 1e-45, 1e-320, 0.999999, 1.000001, 1 - 1e-16, 10.0]
FRACTIONS += [100.0, 1e4, 1e6, 1e12, 1e20, 1e38, 1e39, 1e100, 1e308, -1.0, -1e-300, -1e30]
WORDS = ["", " ", "abc", "1.5", "1e3", "0x10", "1_000", "nan", "inf", "-inf", "-nan", "None", "true", "-", "1,2", "漢"]
TEXTS = ["", " ", ".", "..", "a/b", "../x", "a\\b", "läufe 漢", "a b", " a", "a\nb", "a\0b", "-x", "x" * 201, "x" * 300]
TEXTS += ["x" * 5000, "/" * 50, "~", "~nobody/x", "file", "file/below", "/dev/null", "/proc/x", "folder", "none"]
TEXTS += ["auto", "\udce4", "cp1252", "utf-8", "shift_jis", "rot13", "base64", "idna", "undefined", "text", "pydocs"]
CHUNK = 100
"""Examples of one seed."""

ENDS = ("refused", "trained", "diverged", "not run")
LONGEST = 2e10
"""Floating-point operations of an example's training at most."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field as the command line has it: its name with dots, its type."""

    name: str
    hint: Any


def fields(kind: type[Any] = Config, prefix: str = "") -> Iterator[Field]:
    """Every field of the configuration; of stages the first and the second one's."""
    for name, hint in hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{name}.")
        elif get_args(hint)[:1] == (StageConfig,):
            for i in range(2):
                yield from fields(StageConfig, f"{prefix}{name}.{i}.")
        else:
            yield Field(f"{prefix}{name}", hint)


FIELDS = list(fields())


def values(field: Field) -> st.SearchStrategy[list[str]]:
    """The words after the option: mostly of its kind, now and then of another."""
    hint = str(field.hint)
    if get_origin(field.hint) is Literal:
        return st.sampled_from([*map(str, get_args(field.hint)), *WORDS[:4]]).map(lambda word: [word])
    if field.hint is bool:
        return st.sampled_from(["", "no", "true"]).map(lambda word: [word])
    whole = st.sampled_from(WHOLE) | st.integers(0, 8) | st.integers(-2, 40)
    number = whole if "int" in hint else st.sampled_from(FRACTIONS) | st.floats(0, 1) | st.floats(0, 2)
    texts = st.sampled_from(TEXTS) | st.text(max_size=8)
    one = texts if "str" in hint else st.one_of(*[number.map(_written)] * 5, st.sampled_from(WORDS))
    many = st.lists(one, max_size=4)
    return many if "tuple" in hint else one.map(lambda word: [word])


def _written(number: float) -> str:
    """As a person would write it: an integer of any number of digits too."""
    if isinstance(number, int) and abs(number) > 10**4000:
        return "1" + "0" * 5000
    return str(number)


@st.composite
def examples(draw: st.DrawFn, only: str = "") -> tuple[str, list[str]]:
    """(The field that the example is about, the command line). only: the field, if it is to be this one."""
    first = draw(st.sampled_from([field for field in FIELDS if only in ("", field.name)]))
    others = draw(st.lists(st.sampled_from(FIELDS), max_size=1, unique_by=lambda field: field.name))
    said = {field: draw(values(field)) for field in (first, *others)}
    return first.name, command_line(said)


def command_line(said: dict[Field, list[str]]) -> list[str]:
    """What every example has, and after it, which goes before it, what this one says."""
    staged = any(field.name.startswith("schedule.stages") for field in said)
    words = ["speedrun" if staged else "tiny", *(STAGED if staged else TINY).split()]
    if any(field.name in ("model.unet_skips", "model.block_skip", "model.backout") for field in said):
        words.append("--model.layers=4")
    for field, given_words in said.items():
        if field.hint is bool and given_words[0] in ("", "no"):
            section, dot, last = field.name.rpartition(".")
            words.append(f"--{section}{dot}{'no-' if given_words[0] else ''}{last}")
        elif len(given_words) == 1:
            words.append(f"--{field.name}={given_words[0]}")
        else:
            words += [f"--{field.name}", *given_words]
    return words


def outcome(arguments: list[str], folder: Path) -> tuple[str, str]:
    """(refused, trained, diverged or not run; the sentence). Raises whatever else comes, and AssertionError for a run
    that is neither."""
    there = set(folder.rglob("metrics.jsonl"))
    try:
        preset, config = parse(arguments)
        small = shortened(config)
        said = options_said(arguments) if small == config else set()
        rows = small.data.global_batch * max(1, len(small.schedule.stages))
        if config.compile or config.log == "wandb" or flops(small, rows) * small.steps > LONGEST:
            check(config, SINGLE, said)
            return "not run", "starts something outside, or would take long"
        train(preset, small, SINGLE, said)
    except SystemExit as end:
        assert end.code == 2
        return "refused", "of the command line's own"
    except FloatingPointError as error:
        return "diverged", _sentence(error)
    except USER_ERRORS as error:
        assert set(folder.rglob("metrics.jsonl")) == there, error
        return "refused", _sentence(error)
    (run,) = set(folder.rglob("metrics.jsonl")) - there
    lines = [json.loads(line) for line in run.read_text().splitlines()]
    assert small.target_val_loss is not None or len(lines) == number_of_steps(small) + 1
    for line in lines:
        for name in ("train_loss", "val_loss"):
            value = line.get(name, 0.0)
            assert value is not None and abs(value) < float("inf"), (name, value, arguments)
    return "trained", ""


def shortened(config: Config) -> Config:
    """Of as many steps as there is time for."""
    return dataclasses.replace(config, steps=min(config.steps, 4), untimed_steps=min(config.untimed_steps, 2))


def _sentence(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text.strip(), text
    assert isinstance(error, UserError | FloatingPointError | FileNotFoundError | FileExistsError)
    assert not text.startswith("[Errno"), text
    return text


Tally = dict[str, Counter[str]]
"""Field → how many of its examples ended how."""


def walk(count: int, first: int = 0, only: str = "") -> tuple[Tally, list[str]]:
    """So many examples, of Hypothesis's seed `first`, of one field if it is named; also what failed: the command lines,
    and why."""
    tally: Tally = {field.name: Counter() for field in FIELDS}
    failed, quiet = [], io.StringIO()

    @seed(first)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(examples(only))
    def each(example: tuple[str, list[str]]) -> None:
        field, arguments = example
        with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
            Path("file").write_text("")
            Path("folder").mkdir()
            try:
                with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                    ended, _ = outcome(arguments, Path(temporary))
            except Exception as error:
                failed.append(f"{' '.join(map(repr, arguments))}: {''.join(traceback.format_exception(error)[-2:])}")
                ended = "failed"
        tally[field][ended] += 1

    each()
    return tally, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="Hypothesis's first seed (default: 0)")
    parser.add_argument("--add", action="store_true", help="add to the table that is there, of other seeds")
    parser.add_argument("--field", default="", choices=[field.name for field in FIELDS], help="of this one alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    tally: Tally = {field.name: Counter() for field in FIELDS}
    if arguments.add:
        for line in arguments.out.read_text(encoding="utf-8").splitlines():
            name, *counts = (cell.strip() for cell in line.strip("|").split("|"))
            if name in tally:
                tally[name].update(dict(zip(ENDS, map(int, counts[1:]), strict=True)))
    failed: list[str] = []
    seeds = range(arguments.first, arguments.first + arguments.examples, CHUNK)
    with ProcessPoolExecutor(arguments.processes, get_context("spawn"), max_tasks_per_child=5) as pool:
        for future in as_completed([pool.submit(walk, CHUNK, first, arguments.field) for first in seeds]):
            part, wrong = future.result()
            for name, ends in part.items():
                tally[name].update(ends)
            for sentence in wrong:
                print(sentence, flush=True)
            failed += wrong
            arguments.out.write_text(report(tally, len(failed)), encoding="utf-8")
    sys.exit(1 if failed else 0)


def report(tally: Tally, failed: int) -> str:
    """The table, as Markdown."""
    total = sum(tally.values(), Counter[str]())
    lines = [
        "# A walk over all fields of a run's configuration",
        "",
        f"{total.total():,} examples over {len(tally)} fields, on one process: {total['refused']:,} refused in one "
        f"sentence, {total['trained']:,} trained to finite losses, {total['diverged']:,} stopped by the sentence of a "
        f"loss that is not finite, {total['not run']:,} accepted but not trained here (torch.compile, Weights & "
        f"Biases, sizes that take long). Tracebacks, and runs that ended in none of these ways: {failed}.",
        "",
        "`python -m benchmarks.field_walk` makes this table. An example writes the field on the trainer's command "
        "line, now and then beside another.",
        "",
        f"| field | {' | '.join(('examples', *ENDS))} |",
        f"|---|{'---:|' * (1 + len(ENDS))}",
    ]
    for name, ends in tally.items():
        lines.append(f"| {name} | {ends.total()} | {' | '.join(str(ends[end]) for end in ENDS)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
