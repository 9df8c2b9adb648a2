"""A run that offloads: what lies in host memory has its own lines in the ledger, and a column wherever it is shown."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from shardrun.compare import _print_books
from shardrun.compare import read as read_run
from shardrun.plan import show
from shardrun.plan.estimates import Estimate, estimate, kernels_for, planned
from speedrun.config import Config
from speedrun.presets import PRESETS
from speedrun.train import train
from strategies import catalogue
from strategies.ledger.book import memory_lines, summary_lines, unexplained
from strategies.ledger.hardware import find_gpu
from strategies.ledger.terms import MODEL_STATES
from tests.ranks import RankPool
from tests.speedrun.runs import launch_of, small

ZERO2 = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
ZERO3 = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
FSDP = {"reshard_after_forward": True, "wrap": ["Block"], "offload": True}


def train_with(engine: dict[str, Any], name: str, config: Config) -> None:
    launch = launch_of(name, dist.get_rank(), dist.get_world_size())
    train("small", config, dataclasses.replace(launch, engine=engine))


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "engine"), [("fsdp", FSDP), ("zero2", ZERO2), ("zero3", ZERO3)])
def test_the_ledger_of_a_run_that_offloads(ranks: RankPool, name: str, engine: dict[str, Any], tmp_path: Path) -> None:
    config = small(steps=3, eval_every=0, out=str(tmp_path))
    ranks.run(2, train_with, engine, name, config)
    books = json.loads((tmp_path / "run/ledger.json").read_text())["ranks"]
    assert unexplained(books) == []
    for rank in books:
        assert set(rank["host memory"]) == {"after prepare", "after forward", "after backward", "after step"}
        on_host = {line.what: line for line in memory_lines(rank) if line.what.endswith(", on the host")}
        assert on_host["optimizer states, on the host"].measured > 0
        assert rank["memory"]["after backward"]["optimizer states"]["measured"] == 0
        assert set(on_host) <= {line.what for line in summary_lines(rank)}
        # The peak is the device's: activations and what passes, no state that lies elsewhere.
        assert rank["memory"]["peak"]["optimizer states"]["measured"] == 0
        # The books by group know no place.
        states = sum(line["measured"] for line in rank["optimizer states by group"].values())
        assert states == rank["host memory"]["after step"]["optimizer states"]["measured"]

    run = read_run(name, tmp_path / "run")
    assert run.on_host == max(sum(line["measured"] for line in _host(rank).values()) for rank in books)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _print_books([run], 2)
    assert " host " in printed.getvalue() and "optimizer states, on the host" in printed.getvalue()


def _host(rank: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = rank["host memory"]["after backward"]
    return found


def estimates(engine: dict[str, Any] | None, name: str) -> Estimate:
    arguments = type("Arguments", (), {"micro_batch": None, "accumulation": None, "torch": None, "precision": "bf16"})()
    config, gpu = PRESETS["gpt2"][1], find_gpu("h100")
    stages = planned(config, arguments, 8, kernels_for(config, gpu, arguments))
    return estimate(stages, name, 8, "bf16", gpu, engine)


@pytest.mark.parametrize(("name", "engine"), [("fsdp", FSDP), ("zero2", ZERO2), ("zero3", ZERO3)])
def test_a_plan_fits_by_what_the_gpu_holds(name: str, engine: dict[str, Any]) -> None:
    stays, goes = estimates(catalogue.books(name).default_engine(8), name), estimates(engine, name)
    assert not stays.host and goes.host["optimizer states"] > 0
    assert goes.memory["optimizer states"] == 0 and goes.memory["master parameters"] == 0
    assert goes.spare > stays.spare and goes.spare == find_gpu("h100").memory - goes.total
    # Every state is somewhere: ZeRO-3 has gradients in host memory twice, ZeRO-2 in float32.
    states = sum(stays.memory[category] for category in ("master parameters", "optimizer states"))
    assert sum(goes.host[category] for category in ("master parameters", "optimizer states")) >= states
    assert set(goes.host) >= set(MODEL_STATES)
    for shown, column in (([stays], False), ([stays, goes], True)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            show.memory(shown)
        assert ("host" in printed.getvalue()) == column
