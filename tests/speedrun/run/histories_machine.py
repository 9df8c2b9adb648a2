"""Histories of a run's folder at random, and a model of what must be in it.

A rule starts, goes on, goes back, fills the disk, spoils the weights, kills between two changes of the folder, starts
elsewhere or a second time. How a start trains is handed in: test_histories_machine.py has one without a model on one
process, benchmarks/histories.py the trainer on two ranks. The model knows every checkpoint by its history and step, and
of each history its record. After every rule it is compared with the folder: each checkpoint that must be there is there
once and intact, none that should have gone is, and the records are what was trained.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from speedrun.config import CheckpointConfig, Config
from speedrun.run.writer import LOCK, Lock, status
from strategies.checkpoint.folder import checkpoints, find_checkpoint, set_aside
from strategies.checkpoint.format import read_index
from strategies.checkpoint.history import history_of, read_history
from strategies.checkpoint.load import verify_files
from tests.speedrun.runs import content, metrics
from tests.strategies.checkpoint.damage import flip

Train = Callable[[Config, int, str], str]
"""A start with this configuration, killed before its nth change of the folder (0: not), with a fault ("full", "nan" or
none) in its second save. Returns "trained", "killed", "ended" by weights that are not finite, or the sentence of its
refusal."""

Key = tuple[str, int]
"""A checkpoint: its history's id and its step."""

CHANGES = ("rename", "replace", "fsync")
"""Of a folder, between which a kill comes."""


@dataclass
class Model:
    """What must be there."""

    ancestors: dict[str, dict[str, int]] = field(default_factory=dict)
    """History → those that it came from, and up to which step."""
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """History → the lines of its record, when it was left or last looked at."""
    must: set[Key] = field(default_factory=set)
    may: set[Key] = field(default_factory=set)
    """Those that a kill may have left behind before they were let go."""
    now: str = ""

    def counts(self, key: Key) -> bool:
        return key[0] == self.now or key[1] <= self.ancestors[self.now].get(key[0], -1)

    def newest(self) -> int:
        return max((key[1] for key in self.must if self.counts(key)), default=0)


def count_changes(die: Callable[[], None], at: int, patch: Any) -> None:
    """From now on call `die` before the nth change of a folder, and before every later one."""
    done = 0

    def counting(function: Any) -> Any:
        def change(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done >= at:
                die()
            return function(*arguments, **options)

        return change

    for name in CHANGES:
        patch.setattr(os, name, counting(getattr(os, name)))


def kept(folder: Path) -> dict[str, bytes]:
    """Every file but what a kill has left: hidden ones, and the lock of a dead process."""
    return {
        name: data
        for name, data in content(folder).items()
        if Path(name).name != LOCK and not any(part.startswith(".") for part in Path(name).parts)
    }


class Histories(RuleBasedStateMachine):
    """`train` and `config` are set by whoever runs it."""

    train: Train
    config: Config
    kills = forks = starts = 0

    @initialize(keep=st.integers(1, 3), best=st.booleans(), steps=st.integers(2, 4))
    def begin(self, keep: int, best: bool, steps: int) -> None:
        self.out = Path(tempfile.mkdtemp(prefix="histories-"))
        self.run, self.model, self.elsewhere, self.settled = self.out / "run", Model(), 0, True
        save = CheckpointConfig(every=1, keep=keep, keep_best=best)
        self.config = replace(type(self).config, out=str(self.out), name="run", eval_every=1, checkpoint=save)
        self.start("none", steps)

    def teardown(self) -> None:
        if hasattr(self, "out"):
            shutil.rmtree(self.out)

    def start(self, resume: str, more: int, kill: int = 0, fault: str = "", base: Key | None = None) -> None:
        """From the newest, or from `base`; then the model follows."""
        type(self).starts += 1
        at = base[1] if base else self.model.newest()
        before = self.model.now
        outcome = type(self).train(replace(self.config, resume=resume, steps=at + more), kill, fault)
        assert outcome in ("trained", "killed") or (outcome, fault) == ("ended", "nan"), outcome
        type(self).kills += outcome == "killed"
        history = read_history(self.run) if self.run.exists() else None
        if history is None:
            assert outcome == "killed"  # before anything
            return
        if history.id != before:
            self._new_history(history.id, history.parent, base)
        elif base and (not self.model.counts(base) or at < self.model.newest()):
            assert outcome == "killed"  # before it went back
            return
        self._follow(at, at + more if outcome == "trained" else None, fault)
        self.settled = outcome == "trained"

    def _new_history(self, new: str, parent: Any, base: Key | None) -> None:
        model = self.model
        if base:
            assert parent == {"id": base[0], "step": base[1]}
            type(self).forks += 1
            inherited = {**model.ancestors[base[0]], base[0]: base[1]}
            model.records[new] = [line for line in model.records[base[0]] if line["step"] <= base[1]]
        else:
            assert not model.newest() and parent is None, "going on must not fork"
            inherited, model.records[new] = {}, []
        model.ancestors[new], model.now = inherited, new

    def _follow(self, at: int, end: int | None, fault: str) -> None:
        """The saves of a start from step `at` and what they let go. end: where it was not killed, its last step."""
        model, saver = self.model, self.config.checkpoint
        moving = read_history(self.run).moving  # type: ignore[union-attr]
        if moving is None and (self.run / "metrics.jsonl").exists():
            lines, kept = metrics(self.run), [line for line in model.records[model.now] if line["step"] <= at]
            assert [line["step"] for line in lines] == [*range(len(lines))] and (end is None or len(lines) == end + 1)
            if lines:  # else it was killed before its first one
                if kept and "val_loss" not in kept[-1]:  # ended before its validation, which then is made up for
                    kept.pop()
                assert lines[: len(kept)] == kept
                model.records[model.now] = lines
        losses = {line["step"]: line["val_loss"] for line in model.records[model.now] if "val_loss" in line}
        there = {key for key, _ in self.found()}
        newest = max((step for one, step in there if one == model.now), default=at)
        for step in range(at + 1, (end or newest) + 1):
            if fault and step == at + 2:
                assert (model.now, step) not in there, "that save was to fail"
                continue
            live = {key for key in model.must | model.may if model.counts(key)} | {(model.now, step)}
            keep = set(sorted(live, key=lambda key: key[1])[-saver.keep :])
            if saver.keep_best:
                keep.add(min(live, key=lambda key: losses.get(key[1], float("inf"))))
            partly = end is None and step == newest  # it may have been killed before it let the others go
            model.may = (model.may | (live - keep)) if partly else model.may - live
            model.must = (model.must - live) | keep
        if end is None:
            model.may |= {(model.now, newest)} - model.must if newest > at else set()

    def found(self) -> list[tuple[Key, Path]]:
        """Every checkpoint that has a name."""
        folder = self.run / "checkpoints"
        paths = [*checkpoints(folder).items(), *((step, path) for _, step, path in set_aside(folder))]
        return [((str(history_of(path).get("id")), step), path) for step, path in paths]

    @invariant()
    def the_folder_is_what_the_model_says(self) -> None:
        if not hasattr(self, "out") or not self.model.now:
            return
        model, found = self.model, self.found()
        keys = [key for key, _ in found]
        assert len(set(keys)) == len(keys), f"one of them is there twice: {sorted(keys)}"
        assert model.must <= set(keys) <= model.must | model.may, (model, keys)
        for key, path in found:
            if key in model.must:
                verify_files(path, read_index(path))
            if self.settled:
                beside = path.parent == self.run / "checkpoints"
                assert beside == model.counts(key) and (beside or path.parent.name == key[0]), path
        if model.newest():
            path = find_checkpoint(self.run)
            assert model.counts((history_of(path)["id"], read_index(path).step))
            assert read_index(path).step == max(key[1] for key in keys if model.counts(key))
        if self.settled:
            assert status(self.run) == "finished"
            assert metrics(self.run) == model.records[model.now]
            for left in {path.name for path in (self.run / "checkpoints/set_aside").glob("*") if path.is_dir()}:
                if (self.run / "checkpoints/set_aside" / left / "metrics.jsonl").exists():
                    assert metrics(self.run / "checkpoints/set_aside" / left) == model.records[left]
        else:
            assert status(self.run) in ("died", "finished", "failed")

    def pick(self, which: int) -> tuple[Key, Path] | None:
        """One of the checkpoints. What is drawn depends on no state: how far a killed start comes is chance."""
        found = sorted(self.found())
        return found[which % len(found)] if found and self.model.newest() else None

    @rule(more=st.integers(1, 3))
    def go_on(self, more: int) -> None:
        self.start("auto", more)

    @rule(more=st.integers(2, 3), fault=st.sampled_from(("full", "nan")))
    def go_on_with_a_fault(self, more: int, fault: str) -> None:
        self.start("auto", more, fault=fault)

    @rule(which=st.integers(0, 999), more=st.integers(1, 3))
    def go_back(self, which: int, more: int) -> None:
        if (picked := self.pick(which)) is None:
            return
        key, path = picked
        self.start(str(path), more, base=key)

    @rule(more=st.integers(1, 3), at=st.integers(1, 40))
    def be_killed(self, more: int, at: int) -> None:
        self.start("auto", more, kill=at)

    @rule(which=st.integers(0, 999), more=st.integers(1, 3), at=st.integers(1, 40))
    def be_killed_while_going_back(self, which: int, more: int, at: int) -> None:
        if (picked := self.pick(which)) is None:
            return
        key, path = picked
        self.start(str(path), more, kill=at, base=key)

    def refused(self, config: Config, words: str) -> None:
        before = kept(self.out)
        said = type(self).train(config, 0, "")
        assert words in said, said
        assert kept(self.out) == before

    @rule()
    def start_a_second_time(self) -> None:
        if not self.settled:
            return
        lock = Lock(self.run)
        try:
            self.refused(replace(self.config, resume="auto", steps=50), "is being trained by process")
        finally:
            lock.release()

    @rule()
    def ask_again_and_for_less(self) -> None:
        if not self.settled:
            return
        steps = len(self.model.records[self.model.now]) - 1
        if steps == self.model.newest():
            self.refused(replace(self.config, resume="auto", steps=steps), "is done")
        if self.model.newest() > 1:
            self.refused(replace(self.config, resume="auto", steps=self.model.newest() - 1), "steps already, more than")

    @rule(which=st.integers(0, 999))
    def ask_for_a_damaged_one(self, which: int) -> None:
        if (picked := self.pick(which)) is None:
            return
        key, path = picked
        file = path / "rank_000.safetensors"
        whole = file.read_bytes()
        flip(file, len(whole) - 40)
        self.refused(replace(self.config, resume=str(path), steps=key[1] + 1), "is damaged")
        file.write_bytes(whole)

    @rule(which=st.integers(0, 999))
    def resume_elsewhere(self, which: int) -> None:
        if (picked := self.pick(which)) is None:
            return
        key, path = picked
        self.elsewhere += 1
        before, name = kept(self.run), f"other{self.elsewhere}"
        assert type(self).train(replace(self.config, resume=str(path), steps=key[1] + 1, name=name), 0, "") == "trained"
        assert kept(self.run) == before
        assert list(checkpoints(self.out / name / "checkpoints")) == [key[1] + 1]
        parent = read_history(self.out / name).parent  # type: ignore[union-attr]
        assert parent and (parent["id"], parent["step"]) == key
        shutil.rmtree(self.out / name)
