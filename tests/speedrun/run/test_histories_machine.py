"""A small sample of random histories, on one process and without a model: the folder, the record, the saver and what
decides between them are the trainer's own. benchmarks/histories.md has a hundred, of the trainer on two ranks."""

import functools
import hashlib
import itertools
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from speedrun.config import Config
from speedrun.run import forks
from speedrun.run.checkpoints import Checkpoints, asked_to_resume
from speedrun.run.folder import RunFolder
from speedrun.run.writer import one_writer
from strategies.base import Strategy
from strategies.checkpoint import save as saving
from tests.speedrun.run.histories_machine import Histories, count_changes
from tests.speedrun.runs import launch_of, small
from tests.strategies.checkpoint.runs import start

ids = itertools.count(1)


class Killed(BaseException):
    """Not an Exception: nothing that cleans up after a mistake sees it."""


@functools.cache
def strategy() -> Strategy:
    return start("single")


def second_fails(fault: str) -> Any:
    """In place of what looks for values that are not finite, or writes a file: right but for its second call."""
    calls, original = 0, saving.first_not_finite if fault == "nan" else saving.write_shard

    def call(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != 2:
            return original(*arguments)
        if fault == "nan":
            return "weight/embed.weight"
        raise OSError(28, "No space left on device")

    return call


def train_lightly(config: Config, kill: int, fault: str) -> str:
    """What the trainer does with a run's folder, around steps that compute nothing."""

    def die() -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda _: None)
        patch.setattr(forks, "new_id", lambda: f"{next(ids):08x}")  # the same in every run of this test
        if kill:
            count_changes(die, kill, patch)
        if fault:
            patch.setattr(saving, "first_not_finite" if fault == "nan" else "write_shard", second_fails(fault))
        try:
            return run_lightly(config)
        except Killed:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join(30)
            return "killed"
        except (ValueError, FileNotFoundError) as error:
            return str(error)


def run_lightly(config: Config) -> str:
    one, launch = strategy(), launch_of("single")
    shapes = {name: tuple(weight.shape) for name, weight in one.optimizer.full_weights().items()}
    with one_writer("light", config, launch) as home:
        resumed = asked_to_resume(config, shapes, "data")
        if resumed and resumed.done:
            return resumed.done
        folder = RunFolder(home.folder, config, launch, "light", "data", 1, resumed)
        about = {"data_hash": "data", "history": folder.history.about()}
        saver = Checkpoints(config, launch, one, about, lambda _: None, folder.path / "checkpoints")
        if resumed:
            resumed.restore(one, lambda _: None)
        folder.open()
        first = resumed.step if resumed else 0
        for step in range(first if first else -1, config.steps):
            score = int(hashlib.sha256(f"{folder.history.id} {step}".encode()).hexdigest()[:4], 16) / 1e4
            line = {"step": step + 1, "val_loss": score, "train_time_ms": 0.0}
            folder.step(line)
            if step >= 0:
                saver.after_step(line, ending=step + 1 == config.steps)
                saver.wait()
                if saver.saver and not saver.saver.done:
                    raise Killed
        folder.finish("finished")
    return "trained"


def test_what_must_exist_is_what_the_folder_holds() -> None:
    class Lightly(Histories):
        train = staticmethod(train_lightly)
        config = small()

    run_state_machine_as_test(
        Lightly,
        settings=settings(
            max_examples=20,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert min(Lightly.forks, Lightly.kills) > 5, (Lightly.starts, Lightly.forks, Lightly.kills)
