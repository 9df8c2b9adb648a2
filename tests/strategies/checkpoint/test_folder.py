"""Complete or not there: kills, full disks, what stays and what goes."""

import dataclasses
import os
import random
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from strategies.checkpoint import folder as folders
from strategies.checkpoint import save as saving
from strategies.checkpoint.folder import checkpoints, clear, find_checkpoint, name_of
from strategies.checkpoint.format import SUMS, Stored, read_index
from strategies.checkpoint.load import load, verify_files
from strategies.checkpoint.save import Saver
from strategies.checkpoint.shards import Shards
from strategies.layout import Interval
from tests.ranks import RankPool, processes
from tests.strategies.checkpoint.runs import CASE, STEPS, start, train


def saver(folder: Path, keep: int = 2, keep_best: bool = False) -> Saver:
    strategy = start("single")
    train(strategy, 0, 1)
    return Saver(folder, "single", "fp32", strategy.optimizer, keep, keep_best)


def save(one: Saver, step: int, score: float | None = None) -> None:
    one.save(step, {}, score)
    one.wait()
    assert one.failure is None, one.failure


def test_the_newest_stay_and_the_best(tmp_path: Path) -> None:
    one = saver(tmp_path, keep=2, keep_best=True)
    for step, score in ((1, 5.0), (2, 3.0), (3, 4.0), (4, None), (5, 3.5)):
        save(one, step, score)
    assert list(checkpoints(tmp_path)) == [2, 4, 5]
    save(one, 6, 2.0)
    assert list(checkpoints(tmp_path)) == [5, 6]  # 2 is the best no more
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert find_checkpoint(tmp_path) == tmp_path / name_of(6)


def test_a_run_needs_one_to_keep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep at least 1"):
        saver(tmp_path, keep=0)


def test_a_save_of_the_same_step_takes_the_others_place(tmp_path: Path) -> None:
    one = saver(tmp_path)
    save(one, 3)
    (tmp_path / name_of(3) / "old").touch()
    save(one, 3)
    verify_files(tmp_path / name_of(3), read_index(tmp_path / name_of(3)))
    assert not (tmp_path / name_of(3) / "old").exists()


def test_training_goes_on_while_a_save_is_written_and_the_copy_is_of_its_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes for ever; the run trains on, and what is saved is what was there when `save` was called."""
    strategy = start("single")
    train(strategy, 0, 2)
    before = strategy.optimizer.full_weights()
    write, let_go = saving.write_shard, threading.Event()

    def slowly(*arguments: object) -> object:
        assert let_go.wait(60)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "write_shard", slowly)
    one = Saver(tmp_path, "single", "fp32", strategy.optimizer)
    one.save(2, {})
    losses = train(strategy, 2, STEPS)
    assert not checkpoints(tmp_path)
    let_go.set()
    one.wait()
    other = start("single", seed=1)
    load(find_checkpoint(tmp_path), read_index(find_checkpoint(tmp_path)), other)
    assert all(torch.equal(weight, before[name]) for name, weight in other.optimizer.full_weights().items())
    assert train(other, 2, STEPS) == losses


def test_it_is_read_into_what_the_optimizer_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of step counts a copy is made, because they are compared first; of nothing else."""
    save(saver(tmp_path), 1)
    other, read, places = start("single", seed=1), Shards.read, set()

    def look(self: Shards, name: str, tensor: Stored, wanted: Interval, out: torch.Tensor) -> None:
        if tensor.shape:
            places.add(out.untyped_storage().data_ptr())
        read(self, name, tensor, wanted, out)

    monkeypatch.setattr(Shards, "read", look)
    load(find_checkpoint(tmp_path), read_index(find_checkpoint(tmp_path)), other)
    generator = 1  # its state
    held = other.held()
    used = {t.untyped_storage().data_ptr() for kind in ("parameters", "optimizer states") for t in held[kind]}
    assert len(places - used) <= generator and len(places) > 10


def test_a_full_disk_is_a_failure_of_the_save_and_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = saver(tmp_path)
    save(one, 1)
    synced = os.fsync

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    one.save(2, {})
    one.wait()
    assert one.failure and "step 2 was not saved: rank 0 could not write" in one.failure and "No space" in one.failure
    assert [path.name for path in tmp_path.iterdir()] == [name_of(1)]
    monkeypatch.setattr(os, "fsync", synced)
    save(one, 3)
    assert list(checkpoints(tmp_path)) == [1, 3]


def fail_on_rank_1(folder: Path) -> str | None:
    strategy = start("fsdp")
    train(strategy, 0, 1)
    one = Saver(folder, "fsdp", "fp32", strategy.optimizer)
    with pytest.MonkeyPatch.context() as patch:
        if strategy.optimizer.place.rank == 1:
            patch.setattr(
                saving, "write_shard", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
            )
        one.save(1, {})
        one.wait()
    return one.failure


@pytest.mark.ranks
def test_rank_0_says_which_rank_could_not_write(ranks: RankPool, tmp_path: Path) -> None:
    failures = ranks.run(2, fail_on_rank_1, tmp_path)
    assert "rank 1 could not write its part" in failures[0] and "rank 1" in failures[1]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_has_left_is_cleared_away(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    (tmp_path / f"{folders.WRITING}{name_of(2)}-abc").mkdir()
    (tmp_path / f"{folders.DELETING}{name_of(0)}").mkdir()
    (tmp_path / name_of(1)).rename(tmp_path / f"{folders.REPLACED}{name_of(1)}")  # killed between the two renames
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name_of(1)]
    verify_files(tmp_path / name_of(1), read_index(tmp_path / name_of(1)))


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / name_of(7)):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            find_checkpoint(path)
    (tmp_path / name_of(3)).mkdir()
    with pytest.raises(FileNotFoundError, match=f"{SUMS} is missing"):
        read_index(find_checkpoint(tmp_path))


def save_for_ever(folder: Path, saved: Connection) -> None:
    """In a process of its own: checkpoint after checkpoint of a model that moves, until it is killed."""
    endless = dataclasses.replace(CASE, steps=100_000)  # a schedule that no machine is fast enough to reach the end of
    strategy = start("single", case=endless)
    last = max(checkpoints(folder), default=0)
    if last:
        load(find_checkpoint(folder), read_index(find_checkpoint(folder)), strategy)
        assert strategy.optimizer.full_state()["embed.weight"]["exp_avg"].abs().max() > 0
    one = Saver(folder, "single", "fp32", strategy.optimizer, keep=1)
    for step in range(last, endless.steps):
        train(strategy, step, step + 1, endless)
        one.save(step + 1, {"losses": CASE.rows})
        saved.send(step + 1)


@pytest.mark.ranks
def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    """kill −9 at random moments of an endless series of saves; every time what is there is intact and goes on."""
    chance = random.Random(0)
    newest = 0
    for _ in range(8):
        ours, theirs = processes().Pipe()
        process = processes().Process(target=save_for_ever, args=(tmp_path, theirs), daemon=True)
        process.start()
        theirs.close()
        for _ in range(2):
            assert ours.poll(60), "it saves nothing"
            ours.recv()  # EOFError: it ended by itself
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.join()
        ours.close()
        found = checkpoints(tmp_path)
        assert found and max(found) > newest
        newest = max(found)
        for path in found.values():
            verify_files(path, read_index(path))
