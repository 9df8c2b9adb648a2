"""Predicted is measured over keys and values of the engines' settings, not only over their defaults: to the byte.

Here every two values meet; in `python -m benchmarks.settings` (benchmarks/settings.md), whose code this is, they do so
with each accumulation and precision.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.settings import BOTH_DTYPES, KEYS, RANKS, Lines, Run, differences, measured
from shardrun.certify.equivalence import Case, Trace, compare, run_reference, run_strategy
from speedrun.train import train
from strategies import catalogue
from strategies.base import Settings
from strategies.ledger.book import digits, memory_lines, summary_lines, traffic_lines, unexplained
from strategies.select import Launch
from tests.ranks import RankPool
from tests.speedrun.runs import in_folder, read, small
from tests.strategies.small import place

NOT_SAID = "not said"


def factors_of(strategy: str) -> dict[str, tuple[Any, ...]]:
    keys = {key: (NOT_SAID, *values) for key, values in KEYS[strategy].items()}
    return keys | {"accumulation": (1, 2), "precision": BOTH_DTYPES, "optimizer": ("muon", "adamw")}


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Few rows in which every two values of two keys meet: each next one takes two that have not met, and then, key by
    key, the value that has not met most of the row's others.
    """
    waiting = dict.fromkeys(
        frozenset({(a, x), (b, y)})
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
    )
    rows = []
    while waiting:
        row: dict[str, Any] = dict(sorted(next(iter(waiting)), key=str))
        for key, values in factors.items():
            row.setdefault(
                key, max(values, key=lambda v: sum(frozenset({(key, v), o}) in waiting for o in row.items()))
            )
        for one, other in itertools.combinations(row.items(), 2):
            waiting.pop(frozenset({one, other}), None)
        rows.append(row)
    return rows


def runs_of(strategy: str) -> list[Run]:
    keys = KEYS[strategy]
    return [
        Run(
            strategy,
            tuple((key, row[key]) for key in keys if row[key] is not NOT_SAID),
            *(row["accumulation"], row["precision"], row["optimizer"]),
        )
        for row in pairwise(factors_of(strategy))
    ]


def measured_all(runs: list[Run]) -> list[Lines]:
    """On a rank."""
    linear, found = torch.nn.functional.linear, []
    for run in runs:
        found.append(measured(run))
        torch.nn.functional.linear = linear  # ZeRO-3 replaces it for the whole process
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", [name for name in KEYS if name != "hsdp"])  # hsdp: fsdp/test_hsdp.py
def test_predicted_is_measured_over_keys_and_values(ranks: RankPool, strategy: str) -> None:
    world_size, runs = RANKS.get(strategy, 2), runs_of(strategy)
    for rank, found in enumerate(ranks.run(world_size, measured_all, runs)):
        for run, lines in zip(runs, found, strict=True):
            compared, wrong = differences(run, rank, world_size, lines)
            assert compared > 15 and not wrong, "\n".join(wrong)


def test_every_two_values_meet() -> None:
    for strategy in KEYS:
        rows, factors = pairwise(factors_of(strategy)), factors_of(strategy)
        for a, b in itertools.combinations(factors, 2):
            assert {(row[a], row[b]) for row in rows} == set(itertools.product(factors[a], factors[b])), (a, b)


ZERO = "zero_optimization"
CURVES: list[tuple[str, int, dict[str, Any]]] = [
    ("zero1", 2, {ZERO: {"stage": 1, "round_robin_gradients": True, "parameter_alignment": True}}),
    ("zero2", 2, {ZERO: {"stage": 2, "parameter_alignment": True, "contiguous_gradients": False}}),
    ("zero2", 2, {ZERO: {"stage": 2, "reduce_scatter": False}, "gradient_predivide_factor": 2.0}),
    ("zero2", 2, {ZERO: {"stage": 2, "reduce_scatter": False}, "prescale_gradients": True}),
    ("zero3", 2, {ZERO: {"stage": 3, "reduce_scatter": False}, "prescale_gradients": True}),
    ("zero3", 2, {ZERO: {"stage": 3, "stage3_use_all_reduce_for_fetch_params": True, "sub_group_size": 0}}),
    ("zero3", 2, {ZERO: {"stage": 3, "stage3_allgather_sequential": True, "stage3_max_reuse_distance": 5000}}),
    ("zero3", 2, {ZERO: {"stage": 3, "zero_hpz_partition_size": 2}}),
    ("fsdp", 4, {"reshard_after_forward": 2, "wrap": ["Block"]}),
]
"""Settings by which an engine's mathematics could go wrong: strategy, ranks, engine."""
CASE = Case(accumulation=2, rows=16, steps=4, tied=True)
"""With biases, whose sizes divide by nothing, so that what is aligned is padded."""


def train_with(strategy: str, engine: dict[str, Any]) -> Trace | None:
    """On a rank: the trace, from rank 0 alone."""
    made = catalogue.engine(strategy, Settings(place(), "fp32", engine))
    trace = run_strategy(CASE, made, dist.get_rank(), dist.get_world_size())
    forget_groups()
    return trace if dist.get_rank() == 0 else None


def forget_groups() -> None:
    """DeepSpeed keeps the groups of zero_hpz_partition_size for the whole process; the next engine would use them."""
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


@pytest.mark.ranks
def test_the_curve_is_the_single_process_runs(ranks: RankPool) -> None:
    reference = run_reference(CASE)
    for strategy, world_size, engine in CURVES:
        verdict = compare(ranks.run(world_size, train_with, strategy, engine)[0], reference)
        assert verdict.equal, f"{engine}: {verdict}"


NOT_PREDICTED: list[tuple[str, str, set[str]]] = [
    ("zero3", "zero_hpz_partition_size", {"parameters", "all_gather"}),
    ("zero3", "stage3_module_granularity_threshold", {"parameters", "all_gather", "reduce_scatter"}),
]


def run_here(strategy: str, engine: dict[str, Any], folder: Path) -> None:
    """On a rank: a run of the trainer."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    train(
        "small", in_folder(small(), folder), Launch(strategy, rank, rank, world_size, world_size, "fp32", True, engine)
    )
    forget_groups()


@pytest.mark.ranks
@pytest.mark.parametrize(("strategy", "key", "lines"), NOT_PREDICTED, ids=[key for _, key, _ in NOT_PREDICTED])
def test_what_is_not_predicted_trains_and_says_so(
    ranks: RankPool, tmp_path: Path, strategy: str, key: str, lines: set[str]
) -> None:
    """Its lines have a measured side alone, and name the setting; all others are as predicted."""
    value = 2 if key.startswith("zero_hpz") else 2000  # so that attention is a leaf, and the whole model is not
    ranks.run(2, run_here, strategy, {ZERO: {"stage": 3, key: value}}, tmp_path)
    books = read(tmp_path / "run", "ledger.json")["ranks"]
    assert unexplained(books) == []
    for rank in books:
        entries = {line.what.partition(" ")[0] if "×" in line.what else line.what: line for line in traffic_lines(rank)}
        after = memory_lines(rank, "after forward")
        unknown = {line.what for line in after if line.predicted is None}
        unknown |= {line.what.partition(" ")[0] for line in traffic_lines(rank) if line.predicted is None}
        assert unknown == lines and entries
        for line in [*after, *traffic_lines(rank), *summary_lines(rank)]:
            if line.predicted is None:
                assert line.why == f"not predicted: zero_optimization.{key}"
                assert line.measured and line.remainder is None and digits(line.predicted) == "–"
            elif line.what != "everything, at the peak":
                assert line.remainder == 0, line
