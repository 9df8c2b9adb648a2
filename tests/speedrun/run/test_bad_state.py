"""A bad batch and a bad state are different things: a state that is not finite ends a run under every policy."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import speedrun.train
from speedrun.config import CheckpointConfig, Config
from speedrun.run.faults import ROW, Faults, Found
from strategies.checkpoint.folder import checkpoints
from strategies.loss_scale import DynamicLossScale
from tests.ranks import RankPool
from tests.speedrun.runs import metrics, read, small, train_here

NAN = float("nan")
SAVE = CheckpointConfig(every=1, keep=1)
NAMES = ("single", "ddp", "fsdp", "zero2", "zero3")


def ended(name: str, run: Config, change: Callable[[pytest.MonkeyPatch], None]) -> str:
    """On a rank: how a changed run ended, in its own words."""
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        try:
            train_here(name, run)
        except FloatingPointError as error:
            return str(error)
    return "finished"


def spoil_after(name: str, run: Config, step: int, what: str) -> str:
    """The update of that step leaves NaN in the embedding, on the last rank that holds some of it."""

    original = speedrun.train.set_schedules

    def set_schedules(strategy: Any, config: Config, at: int, *rest: Any) -> float:
        if at == step:  # the step after it, from 0: before its forward pass
            optimizer = strategy.optimizer
            (piece,) = (piece for piece in optimizer.all_slices() if piece.name == "embed.weight")
            last = max(rank for rank, held in enumerate(piece.state) if held.numel)
            if optimizer.place.rank == last or piece.replicated:
                with torch.no_grad():
                    if what == "weight":
                        optimizer.weight(piece).fill_(NAN)
                    else:
                        optimizer.state_of(piece, what)[0] = NAN
            strategy.publish_weights()
        return original(strategy, config, at, *rest)

    return ended(name, run, lambda patch: patch.setattr(speedrun.train, "set_schedules", set_schedules))


@pytest.mark.ranks
@pytest.mark.parametrize("policy", ("stop", "skip"))
@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_finite_end_the_run_and_name_where_to_go_on(
    ranks: RankPool, tmp_path: Path, name: str, policy: Any
) -> None:
    size = 1 if name == "single" else 2
    run = small(out=str(tmp_path), steps=9, eval_every=0, on_nonfinite=policy, checkpoint=SAVE)
    sentences = ranks.run(size, spoil_after, name, run, 4, "weight")
    saved = checkpoints(tmp_path / "run/checkpoints")
    assert len(set(sentences)) == 1 and list(saved) == [4]  # saved before it was spoilt; step 5 was not
    assert "the loss is nan at step 5; first not finite is the weight embed.weight, since an update" in sentences[0]
    assert f"no later step can mend that; the last checkpoint that is finite is {saved[4]}" in sentences[0]
    summary = read(tmp_path / "run", "summary.json")
    assert (summary["status"], summary["error"]) == ("failed", sentences[0])
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]
    ranks.run(size, train_here, name, dataclasses.replace(run, resume="auto"))  # and so it does go on
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(10))


@pytest.mark.ranks
@pytest.mark.parametrize("name", ("single", "zero2", "fsdp"))
def test_a_state_that_only_the_save_sees_ends_the_run_too(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """The loss stays finite: AdamW's second moment is spoilt in an element whose update that makes NaN a step later."""
    size = 1 if name == "single" else 2
    run = small(out=str(tmp_path), steps=30, eval_every=0, on_nonfinite="skip", checkpoint=SAVE)
    sentence, *others = ranks.run(size, spoil_after, name, run, 4, "exp_avg_sq")
    assert all(other == sentence for other in others) and "embed.weight" in sentence
    saved = checkpoints(tmp_path / "run/checkpoints")
    assert list(saved) == [4] and f"the last checkpoint that is finite is {saved[4]}" in sentence
    assert read(tmp_path / "run", "summary.json")["status"] == "failed"


def lose(name: str, run: Config, steps: set[int]) -> str:
    """The loss of these steps (from 1) is NaN on the last rank, and nothing else is wrong."""
    accumulate, original = speedrun.train.accumulate, speedrun.train.set_schedules
    now = [0]

    def set_schedules(strategy: Any, config: Config, at: int, *rest: Any) -> float:
        now[0] = at + 1
        return original(strategy, config, at, *rest)

    def lost(strategy: Any, *rest: Any) -> torch.Tensor:
        loss = accumulate(strategy, *rest)
        last = strategy.optimizer.place.ranks - 1
        return loss * NAN if now[0] in steps and strategy.optimizer.place.global_rank == last else loss

    def change(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(speedrun.train, "set_schedules", set_schedules)
        patch.setattr(speedrun.train, "accumulate", lost)

    return ended(name, run, change)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ("single", "fsdp", "zero2"))
def test_bad_batches_are_left_out_but_not_without_end_and_not_at_the_end(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    size = 1 if name == "single" else 2
    run = small(out=str(tmp_path), steps=40, eval_every=0, on_nonfinite="skip", checkpoint=SAVE, name="some")
    assert set(ranks.run(size, lose, name, run, {3, 4, 9})) == {"finished"}
    assert [line["step"] for line in metrics(tmp_path / "some") if line.get("skipped")] == [3, 4, 9]
    run = dataclasses.replace(run, name="all")
    sentences = ranks.run(size, lose, name, run, set(range(3, 41)))
    assert len(set(sentences)) == 1 and sentences[0].startswith(f"{ROW} steps in a row were left out, and the last")
    summary = read(tmp_path / "all", "summary.json")
    assert summary["status"] == "failed" and summary["step"] == 1 + ROW
    run = dataclasses.replace(run, name="end", steps=5)
    sentences = ranks.run(size, lose, name, run, {5})
    assert len(set(sentences)) == 1 and sentences[0].startswith("the last step was left out: the loss is nan at step 5")
    assert read(tmp_path / "end", "summary.json")["status"] == "failed"
    assert list(checkpoints(tmp_path / "end/checkpoints")) == [5]


def test_a_row_is_ended_by_a_step_that_counts_and_not_by_an_overflow() -> None:
    faults = Faults(Config(on_nonfinite="skip"), lambda _: None)
    for step in range(1, ROW):
        assert not faults.after_step(step, NAN, NAN, lambda: Found("x"))
    assert faults.after_step(ROW, 3.0, 1.0, lambda: Found("x")) and faults.row == []
    faults.at_end()
    for step in range(1, ROW):
        assert not faults.after_step(step, NAN, NAN, lambda: Found("x"))
        assert not faults.after_step(step, 3.0, NAN, lambda: Found("x"), DynamicLossScale())
    with pytest.raises(FloatingPointError, match=f"the last {ROW - 1} steps were left out"):
        faults.at_end()
    with pytest.raises(FloatingPointError, match=f"{ROW} steps in a row were left out"):
        faults.after_step(ROW, NAN, NAN, lambda: Found("x"))


@pytest.mark.ranks
@pytest.mark.parametrize("name", ("single", "zero3"))
def test_a_state_that_is_not_finite_before_the_first_step_is_named(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """As an untimed step would leave it whose update is not finite: 0 · NaN is NaN."""
    run = small(out=str(tmp_path), untimed_steps=1)
    sentences = ranks.run(1 if name == "single" else 2, warm_up_spoils, name, run)
    assert len(set(sentences)) == 1
    assert sentences[0].startswith("first not finite is the weight embed.weight, since an update before, on rank")
    assert "before the first step. An untimed step" in sentences[0]
    assert read(tmp_path / "run", "summary.json")["status"] == "failed"


def warm_up_spoils(name: str, run: Config) -> str:
    original = speedrun.train.untimed_steps

    def untimed_steps(strategy: Any, *rest: Any) -> None:
        original(strategy, *rest)
        for piece in strategy.optimizer.all_slices():
            if piece.name == "embed.weight":
                with torch.no_grad():
                    strategy.optimizer.weight(piece)[:1] = NAN

    return ended(name, run, lambda patch: patch.setattr(speedrun.train, "untimed_steps", untimed_steps))
