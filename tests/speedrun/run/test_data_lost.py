"""Data that change under a run, or between two parts of one: noticed, said with the file's name, nothing trained on."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from speedrun.config import CheckpointConfig, Config, DataConfig, ModelConfig
from speedrun.data.shards import find_shards, shards_hash_before, write_tokens
from speedrun.run.ending import DataLost
from strategies.checkpoint.folder import checkpoints
from strategies.checkpoint.format import read_index
from tests.ranks import RankPool
from tests.speedrun.runs import metrics, read, small, train_here


def on_shards(folder: Path, **fields: Any) -> Config:
    """A run on 600 kB of tokens in `folder`."""
    rng = np.random.default_rng(0)
    if not folder.exists():
        folder.mkdir()
        for name, count in (("a_train_0", 300_000), ("a_val_0", 1_000)):
            write_tokens(folder / f"{name}.bin", rng.integers(0, 500, count))
    data = DataConfig(source=str(folder), sequence_length=16, global_batch=4, eval_tokens=64)
    model = ModelConfig(vocab_size=50_257, layers=1, heads=1, width=8, mlp_width=8, max_sequence_length=64)
    save = CheckpointConfig(every=50)
    optimizer = dataclasses.replace(small().optimizer, orthogonalization_dtype="float32")
    return small(data=data, model=model, checkpoint=save, optimizer=optimizer, eval_every=0, **fields)


def change_after(name: str, config: Config, step: int, change: Callable[[Path], None]) -> None:
    """On a rank: the run, in which rank 0 changes the training shard while the step goes on."""
    from speedrun.run.checkpoints import Checkpoints

    def after_step(self: Any, line: dict[str, Any], ending: bool) -> None:
        if line["step"] == step and (name == "single" or dist.get_rank() == 0):
            change(Path(config.data.source) / "a_train_0.bin")
        original(self, line, ending)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataLost, match=r"^Shard .*a_train_0.bin "):
        original = Checkpoints.after_step
        patch.setattr(Checkpoints, "after_step", after_step)
        train_here(name, config)


def cut(path: Path) -> None:
    os.truncate(path, 100_000)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "world_size", "change"),
    [("single", 1, cut), ("ddp", 2, cut), ("fsdp", 2, os.unlink), ("zero2", 2, cut)],
)
def test_data_that_change_end_the_run_in_a_sentence(
    ranks: RankPool, tmp_path: Path, name: str, world_size: int, change: Callable[[Path], None]
) -> None:
    """On every rank after the same step, which is saved. Before, a shard that was cut ended them with SIGBUS."""
    config = on_shards(tmp_path / "shards", out=str(tmp_path), steps=40)
    ranks.run(world_size, change_after, name, config, 5, change)
    summary = read(tmp_path / "run", "summary.json")
    assert summary["status"] == "failed" and "a_train_0.bin" in summary["error"]
    last = metrics(tmp_path / "run")[-1]["step"]
    assert 6 <= last <= 8 and list(checkpoints(tmp_path / "run/checkpoints")) == [last]


@pytest.mark.ranks
def test_other_tokens_behind_the_same_name_are_not_gone_on_with(
    ranks: RankPool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = on_shards(tmp_path / "shards", out=str(tmp_path), steps=2, progress="plain")
    ranks.run(1, train_here, "single", config)
    path = tmp_path / "shards/a_train_0.bin"
    content = path.read_bytes()
    path.write_bytes(content[:1024] + b"\7\0" * 300_000)
    again = dataclasses.replace(config, steps=3, resume="auto")
    with pytest.raises(AssertionError, match="is of a run on other data"):
        ranks.run(1, train_here, "single", again)
    path.write_bytes(content)
    ranks.run(1, train_here, "single", again)
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_how_its_data_were_compared(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from speedrun.data import shards
    from speedrun.run.checks import check
    from tests.speedrun.runs import launch_of

    config = on_shards(tmp_path / "shards", out=str(tmp_path), steps=2)
    with monkeypatch.context() as earlier:
        earlier.setattr(shards, "shards_hash", shards_hash_before)
        train_here("single", config)
    index = read_index(tmp_path / "run/checkpoints/step_00000002")
    training, validation = find_shards(tmp_path / "shards")
    assert index.run["data_hash"] == shards_hash_before([*training, *validation])
    resumed = check(dataclasses.replace(config, steps=3, resume="auto"), launch_of("single")).resumed
    assert resumed and resumed.step == 2
    assert any(line.startswith("data compared by names and sizes alone") for line in resumed.changed)
