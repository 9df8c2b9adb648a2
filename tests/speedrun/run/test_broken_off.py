"""A run that is told to end while it validates: all ranks break off together, the step before is saved, and whoever
goes on makes up for the validation."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from speedrun.config import CheckpointConfig, Config
from speedrun.data import Data
from speedrun.run.ending import Preempted, Stopped
from strategies.checkpoint.folder import checkpoints
from strategies.checkpoint.format import read_index
from tests.ranks import RankPool
from tests.speedrun.runs import metrics, read, small, train_here

ROWS = 24
SAVE = CheckpointConfig(every=100, keep=3)


def config(out: Path, **fields: Any) -> Config:
    """Many forward passes a validation: one row each."""
    run = small(out=str(out), **{"steps": 6, "eval_every": 3, "checkpoint": SAVE, **fields})
    data = type(run.data)(sequence_length=32, global_batch=12, micro_batch=1, eval_tokens=32 * ROWS)
    return type(run)(**{**vars(run), "data": data})


def signalled(name: str, run: Config, step: int, number: int) -> int:
    """On a rank: the run; the last rank gets a signal in the third pass of that step's validation. Returns the passes
    that this rank made in that validation."""
    passes, whole = [0], Data.validation
    ranks, rank = (1, 0) if name == "single" else (dist.get_world_size(), dist.get_rank())

    def validation(self: Data, first: int, last: int) -> Any:
        done = {line["step"] for line in metrics(Path(run.out) / run.name)}
        if done == set(range(step)) and (step or not done):  # that step's line is not written before it is validated
            passes[0] += 1
            if passes[0] == 3 and rank == ranks - 1:
                os.kill(os.getpid(), number)
        return whole(self, first, last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Data, "validation", validation)
        with pytest.raises(Stopped) as end:
            train_here(name, run)
    assert type(end.value) is (Stopped if number == signal.SIGINT else Preempted)
    return passes[0]


@pytest.mark.ranks
@pytest.mark.parametrize("name", ("single", "ddp", "fsdp", "zero2", "zero3"))
def test_a_validation_breaks_off_on_all_ranks_and_is_made_up_for(ranks: RankPool, tmp_path: Path, name: str) -> None:
    size = 1 if name == "single" else 2
    ranks.run(size, train_here, name, config(tmp_path / "whole"))
    whole = metrics(tmp_path / "whole/run")
    run = config(tmp_path, resume="auto")
    for step, number in ((3, signal.SIGUSR1), (6, signal.SIGINT)):  # in the middle, at the end
        passes = ranks.run(size, signalled, name, run, step, number)
        assert len(set(passes)) == 1 and 3 <= passes[0] <= 4 < ROWS / size
        lines = metrics(tmp_path / "run")
        assert [line["step"] for line in lines] == list(range(step + 1))
        assert "val_loss" not in lines[-1] and lines[-1]["train_loss"] == whole[step]["train_loss"]
        status = "interrupted" if number == signal.SIGINT else "preempted"
        summary = read(tmp_path / "run", "summary.json")
        assert (summary["status"], summary["step"], summary["error"]) == (status, step, None)
        saved = checkpoints(tmp_path / "run/checkpoints")
        assert max(saved) == step and "val_loss" not in read_index(saved[step]).run["metrics"]
    ranks.run(size, train_here, name, run)  # has all its steps, and lacks the last validation
    keys = ("step", "train_loss", "val_loss", "grad_norm", "tokens")
    assert [[line.get(key) for key in keys] for line in metrics(tmp_path / "run")] == [
        [line.get(key) for key in keys] for line in whole
    ]
    summary = read(tmp_path / "run", "summary.json")
    assert (summary["status"], summary["val_loss"]) == ("finished", whole[-1]["val_loss"])
    assert read_index(saved[6]).run["metrics"]["val_loss"] == whole[-1]["val_loss"]


@pytest.mark.ranks
def test_the_best_checkpoint_is_known_once_its_validation_is_made_up_for(ranks: RankPool, tmp_path: Path) -> None:
    """A checkpoint without a score is nobody's best; made up for, it may be. The target counts then too."""
    run = config(tmp_path, resume="auto", checkpoint=CheckpointConfig(every=3, keep=1, keep_best=True))
    ranks.run(2, signalled, "fsdp", run, 6, signal.SIGTERM)
    saved = checkpoints(tmp_path / "run/checkpoints")
    assert list(saved) == [3, 6] and read_index(saved[6]).saved_by["score"] is None
    reached = type(run)(**{**vars(run), "target_val_loss": 100.0})
    ranks.run(2, train_here, "fsdp", reached)
    last = metrics(tmp_path / "run")[-1]
    assert last["step"] == 6 and read_index(saved[6]).saved_by["score"] == last["val_loss"]
    assert list(checkpoints(tmp_path / "run/checkpoints")) == [6]  # the newest, and the best
    assert read(tmp_path / "run", "summary.json")["status"] == "finished"
