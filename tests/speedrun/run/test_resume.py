"""Runs that are saved and go on: the trainer's options, its record, what it refuses."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from speedrun.config import CheckpointConfig, Config, DataConfig, StageConfig
from speedrun.run.checkpoints import asked_to_resume
from speedrun.run.ending import LostRank, NotSaved
from strategies.checkpoint import save as saving
from strategies.checkpoint.folder import checkpoints
from strategies.checkpoint.format import read_index
from tests.ranks import RankPool
from tests.speedrun.runs import STRATEGIES, content, metrics, read, small, train_here
from tests.strategies.checkpoint.damage import flip, spoil

SAVE = CheckpointConfig(every=2, keep=3)
OPTIMIZER = dataclasses.replace(small().optimizer, orthogonalization_dtype="float32")


def run(ranks: RankPool, name: str, world_size: int, out: Path, **fields: Any) -> list[dict[str, Any]]:
    """A run of the trainer; returns its lines."""
    config = small(out=str(out), optimizer=OPTIMIZER, **{"steps": 6, "checkpoint": SAVE, **fields})
    ranks.run(world_size, train_here, name, config)
    return metrics(out / config.name)


def curve(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(line.get(key) for key in ("step", "train_loss", "grad_norm", "val_loss", "lr")) for line in lines]


class Killed(Exception):
    pass


def killed_after(name: str, config: Config, step: int) -> None:
    """On a rank: the run ends as if killed after that step's line was written, in the middle of the next one's."""
    from speedrun.run.checkpoints import Checkpoints

    def after_step(self: Any, line: dict[str, Any], ending: bool) -> None:
        original(self, line, ending)
        if line["step"] == step:
            self.wait()
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        original = Checkpoints.after_step
        patch.setattr(Checkpoints, "after_step", after_step)
        train_here(name, config)


@pytest.mark.ranks
@pytest.mark.parametrize("untimed_steps", (0, 2))
@pytest.mark.parametrize(("name", "world_size"), [("ddp", 3), ("zero2", 2)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    ranks: RankPool, tmp_path: Path, name: str, world_size: int, untimed_steps: int
) -> None:
    """--resume auto: the same command again. One record, whose every figure is the uninterrupted run's, bit for bit."""
    whole = run(ranks, name, world_size, tmp_path / "whole", untimed_steps=untimed_steps)
    out = tmp_path / "killed"
    config = small(
        out=str(out), optimizer=OPTIMIZER, steps=6, checkpoint=SAVE, untimed_steps=untimed_steps, resume="auto"
    )
    ranks.run(world_size, killed_after, name, config, 1)  # before its first checkpoint
    ranks.run(world_size, killed_after, name, config, 5)
    with open(out / "run/metrics.jsonl", "a") as file:
        file.write('{"schema": 1, "step": 6, "tra')
    ranks.run(world_size, train_here, name, config)
    assert curve(metrics(out / "run")) == curve(whole)
    assert [line["tokens"] for line in metrics(out / "run")] == [line["tokens"] for line in whole]
    times = [line["train_time_ms"] for line in metrics(out / "run")]
    assert times == sorted(times)
    for i, line in enumerate(metrics(out / "run")):  # each of the two processes has counted a step
        assert line["timed_steps"] == sum(not before.get("counted") for before in metrics(out / "run")[1 : i + 1])
    assert line["step_avg_ms"] == pytest.approx(line["train_time_ms"] / line["timed_steps"])
    summary = read(out / "run", "summary.json")
    assert (summary["status"], summary["step"]) == ("finished", 6) and read(out / "run", "config.json")[
        "resumed_at"
    ] == 4
    assert list(checkpoints(out / "run/checkpoints")) == [2, 4, 6]
    ranks.run(world_size, train_here, name, config)  # finished already: nothing is lost, nothing trained
    assert curve(metrics(out / "run")) == curve(whole)
    assert read(out / "run", "summary.json")["val_loss"] == whole[-1]["val_loss"]


def kill_rank_1(name: str, config: Config, step: int) -> None:
    """On a rank: the run, in which rank 1 is killed with -9 before that step's line; how it ended for rank 0."""
    from speedrun.run.checkpoints import Checkpoints

    def after_step(self: Any, line: dict[str, Any], ending: bool) -> None:
        if line["step"] == step and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, line, ending)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(LostRank) as end:
        original = Checkpoints.after_step
        patch.setattr(Checkpoints, "after_step", after_step)
        train_here(name, config)
    (Path(config.out) / "end.txt").write_text(str(end.value))


@pytest.mark.ranks
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_killed_rank_is_named_by_the_other_and_the_next_start_goes_on(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    """tests/speedrun/test_launched.py has it with torchrun, which ends and restarts them all."""
    whole = run(ranks, name, 2, tmp_path / "whole")
    config = small(out=str(tmp_path), optimizer=OPTIMIZER, steps=6, checkpoint=SAVE, resume="auto")
    with pytest.raises(AssertionError, match="rank 1 of 2 died"):
        ranks.run(2, kill_rank_1, name, config, 5)
    assert (tmp_path / "end.txt").read_text().startswith("rank 1 ended or hung in step 6, and so all end")
    assert read(tmp_path / "run", "summary.json")["status"] == "failed"
    ranks.run(2, train_here, name, config)
    # A save is written beside the training: the kill may come before the one of step 4 is whole.
    assert read(tmp_path / "run", "config.json")["resumed_at"] in (2, 4)
    assert curve(metrics(tmp_path / "run")) == curve(whole)


@pytest.mark.ranks
def test_a_run_goes_on_elsewhere_under_another_strategy(ranks: RankPool, tmp_path: Path) -> None:
    """--resume PATH, in another folder, under another strategy and number of ranks; its books still balance."""
    whole = run(ranks, "single", 1, tmp_path / "whole")
    run(ranks, "zero3", 3, tmp_path / "first")
    saved = tmp_path / "first/run/checkpoints/step_00000002"
    lines = run(ranks, "fsdp", 2, tmp_path / "second", resume=str(saved))
    assert [line["step"] for line in lines] == [3, 4, 5, 6]
    for ours, theirs in zip(curve(lines), curve(whole[3:]), strict=True):
        assert [x or 0.0 for x in ours] == pytest.approx([x or 0.0 for x in theirs], rel=2e-5)
    for books in read(tmp_path / "second/run", "ledger.json")["ranks"]:
        entries = [entry for moment in books["memory"].values() for entry in moment.values()] + books["traffic"]
        exact = [entry for entry in entries if "why" not in entry]  # those with a reason are estimates
        assert exact and all(entry["remainder"] == 0 for entry in exact)


def full_disk(name: str, config: Config) -> str:
    """On a rank: the run, in which rank 1's disk is full from step 3 on; returns how it ended."""
    with pytest.MonkeyPatch.context() as patch:

        def write_shard(path: Path, tensors: Any) -> Any:
            if dist.get_rank() == 1 and "step_00000002" not in str(path):
                raise OSError(28, "No space left on device")
            return original(path, tensors)

        original = saving.write_shard
        patch.setattr(saving, "write_shard", write_shard)
        try:
            train_here(name, config)
        except NotSaved as error:
            return str(error)
    return "finished"


@pytest.mark.ranks
def test_a_full_disk_warns_or_stops_as_asked_and_the_old_checkpoint_stays(ranks: RankPool, tmp_path: Path) -> None:
    config = small(out=str(tmp_path), steps=40, checkpoint=SAVE, name="warn")
    assert ranks.run(2, full_disk, "fsdp", config) == ["finished", "finished"]
    assert read(tmp_path / "warn", "summary.json")["status"] == "finished"
    assert list(checkpoints(tmp_path / "warn/checkpoints")) == [2]
    config = dataclasses.replace(config, name="stop", checkpoint=dataclasses.replace(SAVE, on_failure="stop"))
    ends = ranks.run(2, full_disk, "fsdp", config)
    assert ends[0] == ends[1] and "a checkpoint could not be saved" in ends[0]
    summary = read(tmp_path / "stop", "summary.json")
    assert summary["status"] == "failed" and "could not be saved" in summary["error"]
    assert 4 <= summary["step"] < 40
    assert list(checkpoints(tmp_path / "stop/checkpoints")) == [2]
    # The last save of a run, which no later step would notice.
    late = dataclasses.replace(config, name="late", steps=4)
    assert "could not be saved" in ranks.run(2, full_disk, "fsdp", late)[0]
    assert read(tmp_path / "late", "summary.json")["status"] == "failed"


@pytest.mark.ranks
def test_the_best_by_validation_stays(ranks: RankPool, tmp_path: Path) -> None:
    lines = run(ranks, "ddp", 2, tmp_path, checkpoint=CheckpointConfig(every=2, keep=1, keep_best=True), steps=8)
    losses = {line["step"]: line["val_loss"] for line in lines if line["step"] and "val_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert list(checkpoints(tmp_path / "run/checkpoints")) == sorted({best, 8})
    assert read_index(tmp_path / f"run/checkpoints/step_{best:08d}").saved_by["score"] == losses[best]


SHAPES: dict[str, tuple[int, ...]] = {}


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved")
    run(ranks, "single", 1, out, steps=2)
    index = read_index(out / "run/checkpoints/step_00000002")
    SHAPES.update(
        {name.removeprefix("weight/"): t.shape for name, t in index.tensors.items() if name.startswith("weight/")}
    )
    return out


def refusal(saved: Path, data_hash: str | None = None, **fields: Any) -> str:
    config = small(out=str(saved), **{"steps": 2, "checkpoint": SAVE, "resume": "auto", **fields})
    if data_hash is None:
        data_hash = json.loads((saved / "run/config.json").read_text())["data_hash"]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        asked_to_resume(config, SHAPES, data_hash)
    return str(error.value)


@pytest.mark.ranks
def test_what_is_not_the_same_run_is_refused_before_anything_starts(saved: Path) -> None:
    data = small().data
    assert "seed 1, and this one has 7; resume with --seed as it was" in refusal(saved, seed=7)
    other = dataclasses.replace(data, global_batch=24)
    assert "data.global_batch 12, and this one has 24; resume with --data.global-batch as" in refusal(saved, data=other)
    softer = dataclasses.replace(small().model, softcap=30.0)
    table = dataclasses.replace(small().schedule, stages=(StageConfig(0.5), StageConfig(1.0, 24)))
    assert "schedule.stages []" in refusal(saved, schedule=table)
    assert "model.softcap 15.0, and this one has 30.0" in refusal(saved, model=softer)
    assert "other data" in refusal(saved, data_hash="another")
    assert "give it one with --name" in refusal(saved, name="")
    assert "there is no checkpoint" in refusal(saved, resume=str(saved / "nowhere"))
    assert "multiple of eval_every 3" in refusal(
        saved, eval_every=3, checkpoint=CheckpointConfig(every=2, keep_best=True)
    )
    assert "keep at least 1" in refusal(saved, checkpoint=CheckpointConfig(every=2, keep=0))


@pytest.mark.ranks
def test_what_may_change_is_said(saved: Path) -> None:
    data = DataConfig(**{**dataclasses.asdict(small().data), "micro_batch": 3})
    config = small(out=str(saved), steps=9, checkpoint=SAVE, resume="auto", data=data)
    data_hash = json.loads((saved / "run/config.json").read_text())["data_hash"]
    resumed = asked_to_resume(config, SHAPES, data_hash)
    assert resumed and resumed.step == 2 and resumed.continues == 2
    assert {"steps 2 → 9", "data.micro_batch 0 → 3"} <= set(resumed.changed)
    assert asked_to_resume(dataclasses.replace(config, resume="none"), SHAPES, data_hash) is None


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "world_size"), [("single", 1), ("fsdp", 2), ("zero2", 2)])
def test_auto_passes_over_what_is_not_finite_and_says_so(
    ranks: RankPool, tmp_path: Path, name: str, world_size: int
) -> None:
    """Checkpoints that an older version has saved. The newest before them is gone on from."""
    run(ranks, name, world_size, tmp_path, steps=6)
    saved = checkpoints(tmp_path / "run/checkpoints")
    for step, tensor in ((4, "weight/embed.weight"), (6, "exp_avg/embed.weight")):
        spoil(saved[step], tensor)
    hashes, shapes = read(tmp_path / "run", "config.json")["data_hash"], shapes_of(saved[2])
    config = small(out=str(tmp_path), steps=8, checkpoint=SAVE, resume="auto", optimizer=OPTIMIZER)
    resumed = asked_to_resume(config, shapes, hashes)
    assert resumed and resumed.step == 2
    assert [why.partition(" is passed over: ")[2] for why in resumed.passed_over] == [
        "the exp_avg of embed.weight is not finite",
        "the weight embed.weight is not finite",
    ]
    for asked in (saved[6], tmp_path / "run"):
        with pytest.raises(ValueError, match="exp_avg of embed.weight is not finite; resume from .*step_00000002, w"):
            asked_to_resume(dataclasses.replace(config, resume=str(asked)), shapes, hashes)
    lines = run(ranks, name, world_size, tmp_path, steps=8, resume="auto")
    assert [line["step"] for line in lines] == list(range(9)) and all(line["train_loss"] for line in lines[1:])
    for path in checkpoints(tmp_path / "run/checkpoints").values():
        spoil(path, "weight/embed.weight")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is finite \(.*begin anew under another --name"):
        asked_to_resume(config, shapes, hashes)


def shapes_of(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    tensors = read_index(checkpoint).tensors
    return {name.removeprefix("weight/"): t.shape for name, t in tensors.items() if name.startswith("weight/")}


@pytest.mark.ranks
def test_a_damaged_checkpoint_ends_the_run_before_it_trains(ranks: RankPool, tmp_path: Path) -> None:
    """It is refused by name, and the folder is as it was."""
    run(ranks, "ddp", 2, tmp_path, steps=4)
    flip(tmp_path / "run/checkpoints/step_00000004/rank_001.safetensors", 4000)
    before = content(tmp_path)
    with pytest.raises(AssertionError, match=r"step_00000004/rank_001.safetensors is damaged"):
        run(ranks, "ddp", 2, tmp_path, steps=6, resume="auto")
    assert content(tmp_path) == before
