"""What every field of the configuration may be, and that a wrong value is refused before anything starts."""

import dataclasses
import inspect
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args

import pytest

from speedrun.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, StageConfig
from speedrun.presets import PRESETS
from speedrun.ranges import Range, Text, allowed_by, check_ranges, hints
from speedrun.run.checks import check, check_memory, machine_memory
from speedrun.run.command_line import parse
from speedrun.stages import number_of_steps, resolve_stages
from strategies import catalogue
from tests.speedrun.runs import launch_of


def fields_of(kind: type[Any], prefix: str = "") -> Iterator[tuple[type[Any], str, str, Any]]:
    """Every field below a dataclass: its class, its name, its name on the command line, its type."""
    for name, hint in hints(kind).items():
        inner = next(
            (part for part in (hint, *get_args(hint)) if isinstance(part, type) and dataclasses.is_dataclass(part)),
            None,
        )
        if inner is None:
            yield kind, name, f"{prefix}{name}", hint
        else:
            yield from fields_of(inner, f"{prefix}{name}.0." if inner is StageConfig else f"{prefix}{name}.")


FIELDS = list(fields_of(Config))
NUMBERS = [row for row in FIELDS if any(isinstance(allowed, Range) for allowed in allowed_by(row[3]))]


def bare(hint: Any) -> set[Any]:
    """The types in a type that say nothing of a range: int of `tuple[int, ...]`, none of `Annotated[int, Range(0)]`."""
    if isinstance(hint, type(Annotated[int, 0])):
        return set()
    return {hint}.union(*map(bare, get_args(hint)))


def with_field(kind: type[Any], name: str, value: Any) -> Any:
    """A stage, a section or the whole configuration with one value."""
    return dataclasses.replace(kind(), **{name: value})


@pytest.mark.parametrize(("kind", "name", "hint"), [pytest.param(k, n, h, id=p) for k, n, p, h in FIELDS])
def test_every_number_and_every_text_says_what_it_may_be(kind: type[Any], name: str, hint: Any) -> None:
    assert not {int, float, str} & bare(hint), f"{kind.__name__}.{name} needs a Range or a Text (speedrun/ranges.py)"


@pytest.mark.parametrize(("kind", "name", "hint"), [pytest.param(k, n, h, id=p) for k, n, p, h in NUMBERS])
def test_its_docstring_says_so_too(kind: type[Any], name: str, hint: Any) -> None:
    allowed = allowed_by(hint)[0]
    each = ", each" if "tuple" in str(hint) else ""
    source = inspect.getsource(kind)
    (doc,) = re.findall(rf'^    {name}: .*\n    """((?:.|\n)*?)"""\n', source, re.MULTILINE)
    assert " ".join(doc.split()).endswith(f" Allowed{each}: {allowed}.")


@pytest.mark.parametrize(("kind", "name", "hint"), [pytest.param(k, n, h, id=p) for k, n, p, h in NUMBERS])
def test_the_ends_of_a_range_are_held(kind: type[Any], name: str, hint: Any) -> None:
    """At, just inside and just outside of both ends; NaN and infinity nowhere. A value for each place of a tuple."""
    allowed = allowed_by(hint)[0]
    assert isinstance(allowed, Range)
    whole = "int" in str(hint)
    first = allowed.least if allowed.least > -math.inf else allowed.above
    last = min(allowed.most, allowed.below)
    low = (first - 1, first, first + 1) if whole else (math.nextafter(first, -math.inf), first, first + 1e-9)
    high = (last - 1, last, last + 1) if whole else (last * 0.999, last, math.nextafter(last, math.inf))
    right = {first: first == allowed.least, last: last == allowed.most and last < math.inf}
    for value, wanted in [
        *zip(low, (bool(allowed.zero and low[0] == 0), right[first], True), strict=True),
        *(zip(high, (True, right[last], False), strict=True) if last < math.inf else ()),
        *((value, False) for value in (math.nan, math.inf, -math.inf, -(10**30))),
        (0, bool(allowed.zero) or allowed.allows(0)),
    ]:
        number = int(value) if whole and math.isfinite(value) else value
        pair = len(get_args(hint)) == 2 and Ellipsis not in get_args(hint) and "tuple" in str(hint)
        given = number if "tuple" not in str(hint) else ((number, number) if pair else (number,))
        if wanted:
            check_ranges(with_field(kind, name, given))
        else:
            with pytest.raises(ValueError, match=rf"^{name} is .*, but (each )?must be .*{_quoted(allowed)}$") as error:
                check_ranges(with_field(kind, name, given))
            assert "\n" not in str(error.value)


def _quoted(allowed: Range) -> str:
    return re.escape(str(allowed))


def test_a_range_in_words() -> None:
    assert str(Range(0, zero="off")) == "0 (off) or above"
    assert str(Range(0, 1)) == "from 0 to 1"
    assert str(Range(0, below=1)) == "from 0 to below 1"
    assert str(Range(2, 10**6, zero="none")) == "0 (none), or from 2 to 1,000,000"
    assert str(Range(above=1, zero="off")) == "0 (off), or above 1"
    assert str(Range(above=0, most=1)) == "above 0 and up to 1"
    assert str(Range(1e-30)) == "1e-30 or above"


@pytest.mark.parametrize(
    "options",
    [
        "--schedule.warmup -5",
        "--schedule.decay -0.5",
        "--schedule.decay 1.5",
        "--schedule.final 5",
        "--schedule.future-weights -1 0.5",
        "--optimizer.muon-momentum 1.0",
        "--optimizer.muon-momentum 1.5",
        "--optimizer.orthogonalization-steps 0",
        "--optimizer.orthogonalization-steps -3",
        "--optimizer.muon-lr -0.02",
        "--optimizer.eps -1",
        "--optimizer.eps 0",
        "--optimizer.betas 1.0 0.95",
        "--optimizer.betas 0.9 1.5",
        "--optimizer.clip nan",
        "--optimizer.clip -1",
        "--model.layers 0",
        "--model.layers -1",
        "--model.softcap -5",
        "--model.heads 0",
        "--model.pad-vocab-to 0",
        "--model.pad-vocab-to -4",
        "--model.mlp-width -7",
        "--model.ngram-width -3",
        "--model.rope-base 0",
        "--model.rope-base -10",
        "--eval-every -3",
        "--untimed-steps -1",
        "--books-every -2",
        "--collective-timeout 0",
        "--collective-timeout -1",
        "--steps 0",
        "--steps 1000000000000000000",
        "--seed -1",
        "--seed 99999999999999999999",
        "--target-val-loss nan",
        "--checkpoint.keep 0",
        "--model.vocab-size -1",
        "--name ../elsewhere",
        "--name ..",
        "--out=",
        f"--out={'x' * 300}",
        f"--data.source={'x' * 300}",
    ],
)
def test_the_command_line_is_refused_in_one_sentence(options: str) -> None:
    field = options.split("=")[0].split()[0].removeprefix("--").replace("-", "_")
    with pytest.raises(ValueError, match=rf"^{field} is .*, but (each )?must be ") as error:
        parse(["tiny", *options.split()])
    assert "\n" not in str(error.value)


def test_clip_is_refused_in_the_words_that_the_facts_ask_for() -> None:
    with pytest.raises(ValueError, match=r"^optimizer.clip is -1.0, but must be 0 \(off\) or above$"):
        parse(["tiny", "--optimizer.clip", "-1"])
    with pytest.raises(ValueError, match=r"^optimizer.clip is inf, but must be a finite number, 0 \(off\) or above$"):
        parse(["tiny", "--optimizer.clip", "inf"])
    with pytest.raises(ValueError, match=r"^schedule.stages.1.lr is -2.0, but must be 0 or above$"):
        check_ranges(Config(schedule=ScheduleConfig(stages=(StageConfig(0.5), StageConfig(lr=-2.0)))))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_within_their_ranges(preset: str) -> None:
    check_ranges(PRESETS[preset][1])


def checked(config: Config, *said: str) -> list[str]:
    return check(config, launch_of("single"), said).resolved


SMALL = Config(data=DataConfig(sequence_length=32, global_batch=4, eval_tokens=64), steps=3, eval_every=0)


def test_a_warm_up_that_the_run_is_too_short_for_is_refused_where_it_was_asked_for() -> None:
    """One that a preset brings is said: whoever shortens a run to a few steps has not asked for it."""
    longer = dataclasses.replace(SMALL, schedule=ScheduleConfig(warmup=4))
    with pytest.raises(ValueError, match="schedule.warmup is 4, and no rate reaches its peak: the run has 3 steps"):
        checked(longer, "schedule.warmup")
    (line,) = (line for line in checked(longer) if line.startswith("warning"))
    assert line == "warning: schedule.warmup is 4, and no rate reaches its peak: the run has 3 steps"
    exact = dataclasses.replace(SMALL, schedule=ScheduleConfig(warmup=3))
    assert not any(line.startswith("warning") for line in checked(exact, "schedule.warmup"))
    budget = dataclasses.replace(exact, tokens=2 * 4 * 32)  # ends the run after two steps
    with pytest.raises(ValueError, match="the run has 2 steps"):
        checked(budget, "schedule.warmup")


def test_adamw_updates_within_the_run() -> None:
    seldom = dataclasses.replace(SMALL, optimizer=OptimizerConfig(adamw_every=4))
    with pytest.raises(ValueError, match="optimizer.adamw_every is 4, and AdamW never updates: the run has 3 steps"):
        checked(seldom, "optimizer.adamw_every")
    assert any("AdamW never updates" in line for line in checked(seldom))


def test_weight_decay_turns_no_weight_around() -> None:
    for optimizer, stages, names in [
        (OptimizerConfig(muon_lr=0.5, muon_weight_decay=2.5), (), "muon_weight_decay is 2.5 and optimizer.muon_lr 0.5"),
        (OptimizerConfig(head_lr=0.5, weight_decay=2.5), (), "weight_decay is 2.5 and optimizer.head_lr 0.5"),
        (
            OptimizerConfig(muon_lr=0.5, muon_weight_decay=1.5),
            (StageConfig(0.5), StageConfig(lr=2.0)),
            "muon_weight_decay is 1.5 and optimizer.muon_lr 1 at most",
        ),
    ]:
        config = dataclasses.replace(SMALL, optimizer=optimizer, schedule=ScheduleConfig(stages=stages))
        with pytest.raises(ValueError, match=names):
            checked(config)
    checked(dataclasses.replace(SMALL, optimizer=OptimizerConfig(muon_lr=0.5, muon_weight_decay=2.0)))


def test_more_future_tokens_than_a_row_has_are_refused() -> None:
    config = dataclasses.replace(SMALL, schedule=ScheduleConfig(future_weights=(0.1,) * 32))
    with pytest.raises(ValueError, match="schedule.future_weights has 32 weights, but rows of 32 tokens"):
        checked(config)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    for out, name in [("file", ""), ("file/below", "x"), (".", "file")]:
        with pytest.raises(ValueError, match="file is a file, and the run's folder would be"):
            checked(dataclasses.replace(SMALL, out=str(tmp_path / out), name=name))
    checked(dataclasses.replace(SMALL, out=str(tmp_path / "new" / "deep")))


def test_texts_of_all_kinds() -> None:
    name, path = Text(empty=True, name=True), Text()
    assert all(map(name.allows, ("", "run", "läufe 漢", "a b", "-x", "...")))
    assert not any(map(name.allows, (" ", " a", "a ", "a/b", "a\\b", "..", ".", "a\nb", "a\0b", "\ud800", "x" * 201)))
    assert all(map(path.allows, ("a/../b", "/x y/z", "~", "\udce4")))  # a byte that is not UTF-8, as in the shell
    assert not any(map(path.allows, ("", " ", "\t", "a\0", "x" * 4096, "x" * 256, "a/" + "x" * 256, None, 3)))


def test_a_step_count_without_end_is_found_at_once() -> None:
    """The budget's step is calculated, not counted down to."""
    config = Config(steps=10**9, tokens=48 * 256 * 12345 + 5)
    assert number_of_steps(config) == 12345
    table = (StageConfig(0.5, global_batch=1), StageConfig(1.0))
    staged = dataclasses.replace(config, schedule=ScheduleConfig(stages=table))
    steps = number_of_steps(staged)
    taken = [sum((s.last - s.first) * s.tokens_per_step for s in resolve_stages(staged, n)) for n in (steps, steps + 1)]
    assert taken[0] <= config.tokens < taken[1] if config.tokens else False


def test_a_run_that_the_machine_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the books predict it, under every strategy; on GPUs what is offloaded to the host, where no model is made."""
    assert machine_memory() > 2**28
    monkeypatch.setattr("speedrun.run.checks.machine_memory", lambda: 8 * 2**30)
    huge = dataclasses.replace(SMALL, model=ModelConfig(bigram_rows=10**9))
    for strategy in catalogue.spread():
        launch, stages = launch_of(strategy, 0, 2), resolve_stages(huge, 3, 2)
        with pytest.raises(ValueError, match="the run would hold .* GiB.*, and this machine has 8.0 GiB"):
            check_memory(huge, stages, launch)
        check_memory(huge, stages, dataclasses.replace(launch, cpu=False))
    offloads = {**launch_of("fsdp", 0, 2).engine, "offload": True}
    with pytest.raises(ValueError, match="the run would hold"):
        check_memory(huge, stages, dataclasses.replace(launch_of("fsdp", 0, 2), cpu=False, engine=offloads))
    wide = dataclasses.replace(SMALL, data=DataConfig(sequence_length=32, global_batch=10**6, eval_tokens=64))
    with pytest.raises(ValueError, match="the run would hold"):
        checked(wide)
    checked(dataclasses.replace(wide, data=dataclasses.replace(wide.data, micro_batch=4)))
