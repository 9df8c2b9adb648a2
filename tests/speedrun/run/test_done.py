"""Runs of which nothing is left to train: steps, tokens and target; said, and nothing changed."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from speedrun.config import CheckpointConfig, Config
from speedrun.run.done import done_with
from strategies.checkpoint.folder import find_checkpoint
from strategies.checkpoint.format import read_index
from tests.ranks import RankPool
from tests.speedrun.runs import content, metrics, read, small, train_here

pytestmark = pytest.mark.ranks
SAVE = CheckpointConfig(every=2, keep=3)
A_STEP = 12 * 32
"""Tokens."""


def run(ranks: RankPool, out: Path, strategy: str = "ddp", **fields: Any) -> None:
    ranks.run(1 if strategy == "single" else 2, train_here, strategy, config(out, **fields))


def config(out: Path, **fields: Any) -> Config:
    return small(out=str(out), **{"checkpoint": SAVE, "steps": 6, **fields})


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "run"}


@pytest.mark.parametrize("strategy", ("single", "fsdp", "zero2"))
def test_a_run_that_is_done_changes_nothing(ranks: RankPool, tmp_path: Path, strategy: str) -> None:
    run(ranks, tmp_path, strategy)
    before, when = content(tmp_path), times(tmp_path)
    for fields in ({}, {"tokens": 6 * A_STEP, "steps": 50}, {"tokens": 7 * A_STEP - 1, "steps": 50}):
        run(ranks, tmp_path, strategy, resume="auto", **fields)
        run(ranks, tmp_path, strategy, resume=str(tmp_path / "run"), **fields)
        assert content(tmp_path) == before and times(tmp_path) == when
    run(ranks, tmp_path, strategy, resume=str(tmp_path / "run/checkpoints/step_00000004"), steps=4)
    run(ranks, tmp_path, strategy, resume=str(tmp_path / "run"), name="other")  # nothing left for it either
    assert content(tmp_path) == before and times(tmp_path) == when


@pytest.mark.parametrize("every", (2, 0))
def test_fewer_steps_than_there_are_is_refused(ranks: RankPool, tmp_path: Path, every: int) -> None:
    save = dataclasses.replace(SAVE, every=every)
    run(ranks, tmp_path, "single", checkpoint=save)
    before = content(tmp_path)
    for fields, asked in (
        ({"steps": 5}, "--steps 5"),
        ({"steps": 50, "tokens": 5 * A_STEP + 1}, f"the 5 of --tokens {5 * A_STEP + 1}"),
    ):
        with pytest.raises(AssertionError, match=f"run holds 6 steps already, more than {asked}: ask for more"):
            run(ranks, tmp_path, "single", resume="auto", checkpoint=save, **fields)
        assert content(tmp_path) == before


def test_a_run_that_has_reached_its_target_is_done(ranks: RankPool, tmp_path: Path) -> None:
    run(ranks, tmp_path, target_val_loss=100.0)
    assert len(metrics(tmp_path / "run")) == 3  # validated at step 2
    before = content(tmp_path)
    run(ranks, tmp_path, target_val_loss=100.0, resume="auto")
    index = read_index(find_checkpoint(tmp_path / "run"))
    done = done_with(tmp_path / "run", index, config(tmp_path, target_val_loss=100.0), tmp_path / "run")
    assert done.endswith("; a lower --target-val-loss goes on to more.")
    assert content(tmp_path) == before
    run(ranks, tmp_path, target_val_loss=1.0, resume="auto")  # another target, another end
    assert len(metrics(tmp_path / "run")) == 7


def test_a_run_without_checkpoints_is_done_too(ranks: RankPool, tmp_path: Path) -> None:
    run(ranks, tmp_path, "single", checkpoint=CheckpointConfig())
    before = content(tmp_path)
    run(ranks, tmp_path, "single", checkpoint=CheckpointConfig(), resume="auto")
    assert content(tmp_path) == before


def test_one_that_was_killed_after_its_last_save_gets_its_end(ranks: RankPool, tmp_path: Path) -> None:
    run(ranks, tmp_path)
    summary = tmp_path / "run/summary.json"
    summary.write_text(summary.read_text().replace("finished", "running"))
    run(ranks, tmp_path, resume="auto")
    assert read(tmp_path / "run", "summary.json")["status"] == "finished" and len(metrics(tmp_path / "run")) == 7


def test_one_sentence_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_here("single", config(tmp_path))
    train_here("single", config(tmp_path, resume="auto"))
    done = f"{tmp_path / 'run'} is done: it holds all 6 steps that are asked for."
    assert capsys.readouterr().out == f"{done} Nothing was trained and nothing changed; --steps N goes on to more.\n"
    assert not os.path.exists(tmp_path / "run/run.lock")
