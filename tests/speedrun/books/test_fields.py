"""The books know every field: predicted is measured on two ranks, or the line says why.

Here a sample of `python -m benchmarks.books_fields` (benchmarks/books_fields.md), whose code this is: there every value
of every field runs under every strategy, alone and in combinations.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest

from benchmarks.books_fields import (
    BASE,
    CHECKPOINTING,
    COMPILED,
    FIELDS,
    PRECISIONS,
    SAME_BYTES,
    STRATEGIES,
    Found,
    Run,
    all_fields,
    drawn,
    look_at,
    runs_of,
)
from speedrun.books.activations import predict_activations
from speedrun.config import Config
from tests.ranks import RankPool
from tests.speedrun.books.test_activations import assert_agree, make, measure

COMBINATIONS = 4


def test_every_field_of_a_run_has_values_or_changes_no_bytes() -> None:
    """A new field fails here until it has its line in benchmarks/books_fields.py."""
    fields = set(all_fields(Config()))
    assert {name for name in fields if name.startswith("model.")} <= set(FIELDS)
    assert fields == {*FIELDS, *SAME_BYTES, COMPILED} and not set(FIELDS) & SAME_BYTES
    said_again = ("model.attention", "model.kernels")  # what a CPU takes is what `auto` is there
    for name, values in FIELDS.items():
        for value in values:
            value = value.get(name) if isinstance(value, dict) else value
            assert value != getattr_of(BASE, name) or name in said_again, name


def getattr_of(config: object, name: str) -> object:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def look(runs: list[Run], folder: str) -> list[Found]:
    """On a rank."""
    return [look_at(run, Path(folder) / f"{run.strategy}_{number}") for number, run in enumerate(runs)]


def sample() -> list[list[Run]]:
    """Of FP8 all ways that it can be kept, and combinations that were drawn. Strategies take turns."""
    ways = list(itertools.product(PRECISIONS, CHECKPOINTING))
    fp8 = ("model.fp8", {"model.fp8": True})
    found = dict.fromkeys(STRATEGIES[1:], list[Run]())
    for number, (about, fields) in enumerate([*[fp8] * len(ways), *drawn(COMBINATIONS, seed=3)]):
        precision, checkpointing = ways[number % len(ways)]
        strategy = STRATEGIES[1:][number % 5]
        run = Run(strategy, precision, checkpointing, number // 2 % 2, about, tuple(fields.items()))
        found[strategy] = [*found[strategy], run]
    return list(found.values())


@pytest.mark.ranks
@pytest.mark.parametrize("runs", sample(), ids=lambda runs: runs[0].strategy)
def test_predicted_is_measured_or_the_line_says_why(ranks: RankPool, tmp_path: Path, runs: list[Run]) -> None:
    for found in ranks.run(2, look, runs, str(tmp_path))[0]:
        assert found.left == [] and found.equal > 50


def test_every_value_of_the_model_alone_keeps_what_is_predicted() -> None:
    """In a forward pass of one process; precision and checkpointing take turns."""
    for run in runs_of("single", combinations=0):
        precision: Any = "autocast" if run.precision == "bf16" else "fp32"
        if run.about.startswith("model."):
            model = run.config.model
            book = measure(make(model, precision, documents=True), 2, 24, precision)
            assert_agree(book, predict_activations(model, 2, 24, precision, documents=True))
