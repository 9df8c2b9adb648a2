"""A run in fp16: what overflows is left out and recorded, books are of a step that counts, checkpoints keep the scale.

DeepSpeed's check of the device is patched (tests.strategies.small.allow_fp16).
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from speedrun.config import CheckpointConfig, Config, ModelConfig
from speedrun.run.checks import check
from speedrun.train import train
from strategies.loss_scale import DynamicLossScale
from tests.ranks import RankPool
from tests.speedrun.runs import launch_of, metrics, read, small

STEPS, POWER = 12, 23
"""The first scale is 2^POWER, far too large for this model."""


def from_high_up(name: str, config: Config) -> None:
    """On a rank: a run whose loss scale begins far too high."""

    def high(self: DynamicLossScale) -> None:
        self.value, self.clean_steps = 2.0**POWER, 0

    rank, world_size = (0, 1) if name == "single" else (dist.get_rank(), dist.get_world_size())
    launch = launch_of(name, rank, world_size, "fp16")
    if name.startswith("zero"):
        engine = {**launch.engine, "fp16": {"initial_scale_power": POWER, "hysteresis": 1}}
        launch = dataclasses.replace(launch, engine=engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicLossScale, "__init__", high)
        train("small", config, launch)


def scales(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss_scale"] for line in lines if line["step"]]


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "world_size"), [("ddp", 2), ("fsdp", 2), ("zero2", 2)])
def test_steps_that_overflow_are_recorded_and_the_curve_goes_on(
    ranks: RankPool, tmp_path: Path, name: str, world_size: int
) -> None:
    """The books wait for a step that counts: of one that is left out nothing of the update is sent or held."""
    ranks.run(world_size, from_high_up, name, small(out=str(tmp_path), steps=STEPS, eval_every=0))
    lines = [line for line in metrics(tmp_path / "run") if line["step"]]
    skipped = [bool(line.get("skipped")) for line in lines]
    assert 3 <= sum(skipped) < STEPS - 2 and skipped[0] and not skipped[-1]
    assert [line["grad_norm"] is None for line in lines] == skipped
    expected, scale = [], 2.0**POWER
    for left_out in skipped:
        scale = scale / 2 if left_out else scale
        expected.append(scale)
    assert scales(lines) == expected
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] - 0.3
    (counted,) = (line for line in lines if line.get("counted") and not line.get("skipped"))
    ledger = read(tmp_path / "run", "ledger.json")
    assert ledger["step"] == counted["step"] > 3
    for rank in ledger["ranks"]:
        assert not any(line["remainder"] for line in rank["traffic"])
        moments = {moment: entries for moment, entries in rank["memory"].items() if moment != "peak"}
        if name == "ddp":
            del moments["after prepare"]  # its buckets, which only C++ can see
        assert not any(line["remainder"] for entries in moments.values() for line in entries.values())


def one_overflow(config: Config) -> None:
    """On a rank: a run under FSDP whose third step, the one whose books are due, overflows, and no other."""
    steps = iter(range(100))

    def update(self: DynamicLossScale, overflow: bool) -> None:
        self.value = 2.0**40 if next(steps) == 1 else 2.0**10

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicLossScale, "update", update)
        train("small", config, launch_of("fsdp", dist.get_rank(), dist.get_world_size(), "fp16"))


@pytest.mark.ranks
def test_books_that_are_due_at_an_overflow_are_kept_one_step_later(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, one_overflow, small(out=str(tmp_path), steps=6, eval_every=0))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line.get("skipped")] == [3]
    ledger = read(tmp_path / "run", "ledger.json")
    assert ledger["step"] == 4 and not any(line["remainder"] for rank in ledger["ranks"] for line in rank["traffic"])


@pytest.mark.ranks
def test_a_run_goes_on_with_its_scale_under_another_strategy(ranks: RankPool, tmp_path: Path) -> None:
    """Saved while all steps so far were left out, too: there is no optimizer state then, and it is saved as zeros."""
    whole = small(out=str(tmp_path), name="whole", steps=STEPS, eval_every=0)
    ranks.run(2, from_high_up, "ddp", whole)
    for at in (2, 8):
        part = dataclasses.replace(whole, name=f"part{at}", checkpoint=CheckpointConfig(every=at, keep=9))
        ranks.run(2, from_high_up, "ddp", part)
        saved = tmp_path / f"part{at}" / "checkpoints" / f"step_{at:08d}"
        for name in ("ddp", "zero2"):
            ranks.run(2, from_high_up, name, dataclasses.replace(whole, name=f"{name}{at}", resume=str(saved)))
            rest = [line for line in metrics(tmp_path / f"{name}{at}") if line["step"] > at]
            expected = [line for line in metrics(tmp_path / "whole") if line["step"] > at]
            assert scales(rest) == scales(expected), (name, at)
            for ours, theirs in zip(rest, expected, strict=True):
                assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


def test_what_does_not_go_with_fp16_is_refused_in_a_sentence() -> None:
    model = ModelConfig(layers=2, heads=3, width=48, mlp_width=96, max_sequence_length=64, fp8=True)
    with pytest.raises(ValueError, match="model.fp8 is on and mixed_precision is fp16"):
        check(small(model=model), launch_of("single", precision="fp16"))


def test_fp16_on_a_cpu_is_said_to_be_emulated() -> None:
    lines = check(small(), launch_of("single", precision="fp16")).resolved
    native = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert native != any(line.startswith("fp16: emulated here") for line in lines)
