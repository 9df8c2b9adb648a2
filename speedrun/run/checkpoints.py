"""A run's checkpoints: which one to go on from, whether that is this run's, and when to save.

How a checkpoint is written and read is strategies/checkpoint; what the trainer adds is its configuration, the hash of
its data and its last figures. Data position and schedules need no more than the step: both are functions of it.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch.distributed as dist

from speedrun.config import Config
from speedrun.run.done import done_with, done_without, lies_in
from speedrun.run.ending import Stopped
from strategies import strict_json
from strategies.base import Strategy
from strategies.checkpoint.finite import newest_finite, not_finite
from strategies.checkpoint.folder import find_checkpoint, of_history
from strategies.checkpoint.format import Index, read_index
from strategies.checkpoint.load import check_weights, load
from strategies.checkpoint.save import Saver
from strategies.errors import UserError
from strategies.layout import Shape
from strategies.select import Launch

HOW_NOT_WHAT = ("model.checkpointing", "model.kernels", "model.attention")
"""Fields of the model that say how something is computed and not what: they may change between two parts of a run."""

KEPT = "optimizer.orthogonalization_dtype"
"""auto is what the run began with, wherever it goes on: in the middle of a run another precision would be a change."""

NOT_SHOWN = (
    "name",
    "out",
    "log",
    "progress",
    "resume",
    "checkpoint",
    "data.source",
    "on_nonfinite",
    "collective_timeout",
)
"""Fields whose change nobody needs to be told of."""


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from, or none yet (`--resume auto` of a run that has not saved so far)."""

    folder: Path | None
    index: Index | None
    continues: int | None
    """Up to which step the run's own record stays: −1 for none of it, None where the record is a new one."""
    changed: tuple[str, ...] = ()
    """What the configuration has in place of what was saved."""
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints, a sentence for each, from which no run can go on."""
    done: str = ""
    """The sentence about a run of which nothing is left to train; empty where something is."""

    @property
    def step(self) -> int:
        return self.index.step if self.index else 0

    @property
    def train_time(self) -> float:
        """Seconds trained before."""
        return self.index.run["metrics"]["train_time_ms"] / 1e3 if self.index else 0.0

    @property
    def timed_steps(self) -> int:
        """Steps that these took. An older checkpoint has no such figure: in it every step was timed."""
        return self.index.run["metrics"].get("timed_steps", self.step) if self.index else 0

    @property
    def orthogonalization_dtype(self) -> Literal["auto", "bfloat16", "float32"]:
        """What the run began with; auto where there is nothing to go on from yet."""
        saved = self.index.run["config"].get("optimizer", {}) if self.index else {}
        dtype = saved.get("orthogonalization_dtype")
        return dtype if dtype in ("bfloat16", "float32") else "auto"

    def agree(self) -> None:
        """Raises ValueError where the ranks have found different checkpoints to go on from: another run may just have
        ended while they looked. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            found: list[int] = [self.step] * dist.get_world_size()
            dist.all_gather_object(found, self.step)
            if len(set(found)) > 1:
                steps = ", ".join(f"{step} on rank {rank}" for rank, step in enumerate(found))
                raise UserError(f"the ranks found different newest checkpoints (of step {steps}): start the run again.")

    def restore(self, strategy: Strategy, say: Callable[[str], None]) -> None:
        """Make the strategy what it was. Raises ValueError for a damaged checkpoint. Collective."""
        if self.folder is None or self.index is None:
            return
        load(self.folder, self.index, strategy)
        for why in self.passed_over:
            say(why)
        if dist.is_initialized():
            dist.barrier()  # what rank 0 sets aside next, no other rank still reads
        by = self.index.saved_by
        changed = f"; changed since: {', '.join(self.changed)}" if self.changed else ""
        say(f"resumed from {self.folder} (step {self.step}, {by['strategy']} on {by['world_size']}){changed}")


def asked_to_resume(
    config: Config, shapes: Mapping[str, Shape], data_hash: str, older_hash: str = ""
) -> Resumed | None:
    """What `config.resume` asks for, checked against this run; None for a run from the beginning.

    older_hash: what a checkpoint of an earlier version holds for the same data, if not data_hash.

    Raises ValueError or FileNotFoundError, before anything is started, for a checkpoint that is not there, damaged, not
    finite, of another model, of other data, or of a newer format; and where `checkpoint` contradicts itself. auto takes
    the newest that is finite.
    """
    every, eval_every = config.checkpoint.every, config.eval_every
    if every < 0 or config.checkpoint.keep < 1:
        raise UserError(
            f"checkpoint.every {every} and checkpoint.keep {config.checkpoint.keep}: every must be 0 or more, keep at "
            "least 1."
        )
    if config.checkpoint.keep_best and every and (not eval_every or every % eval_every):
        raise UserError(
            f"checkpoint.keep_best needs a validation at every checkpoint: make checkpoint.every {every} a multiple of "
            f"eval_every {eval_every}."
        )
    if config.resume == "none":
        return None
    own = Path(config.out) / config.name
    if config.resume == "auto":
        if not config.name:
            raise UserError("resume auto looks for the run by its name: give it one with --name.")
        if not of_history(own / "checkpoints"):
            return Resumed(None, None, continues=-1, done=done_without(own, config))
    newest, _ = _look_up(own / "checkpoints" if config.resume == "auto" else Path(config.resume))
    folder, passed_over = _finite(newest, auto=config.resume == "auto")
    index = read_index(folder)
    check_weights(folder, index, shapes)
    changed = _compare(folder, index, config, data_hash, older_hash)
    ours = bool(config.name) and lies_in(folder, own)
    last = list(of_history(own / "checkpoints").values())[-1:] if ours else []
    is_last = folder.resolve() in [path.resolve() for path in last]
    done = done_with(folder, index, config, own if is_last else None)
    return Resumed(folder, index, index.step if ours else None, changed, tuple(passed_over), done)


def _finite(newest: Path, auto: bool) -> tuple[Path, list[str]]:
    """The checkpoint to go on from, and why newer ones are not taken: this one, or with auto the newest before it that
    is finite. Raises ValueError where it is not to be had."""
    last = read_index(newest).step
    others = [path for step, path in reversed(of_history(newest.parent).items()) if step < last]
    folder, passed_over = newest_finite([newest, *(others if auto else [])])
    if folder:
        return folder, passed_over
    if auto:
        raise UserError(
            f"no checkpoint in {newest.parent} is finite ({passed_over[0]}): begin anew under another --name, with "
            "lower learning rates."
        )
    earlier = newest_finite(others)[0]
    other = f"resume from {earlier}, which is finite" if earlier else f"no earlier one in {newest.parent} is finite"
    raise UserError(f"{newest} cannot be gone on from: {not_finite(newest, read_index(newest))}; {other}.")


def _look_up(path: Path) -> tuple[Path, Index]:
    """The checkpoint that a path means, and its index. A run that goes on beside this may let the newest one go."""
    for _ in range(10):
        folder = find_checkpoint(path)
        try:
            return folder, read_index(folder)
        except (ValueError, FileNotFoundError):
            if folder.is_dir():
                raise
    raise FileNotFoundError(f"the checkpoints of {path} come and go while they are read: another run writes them.")


def _compare(folder: Path, index: Index, config: Config, data_hash: str, older_hash: str) -> tuple[str, ...]:
    """The fields that differ from the saved configuration, as 'steps 20 → 40'.

    Raises ValueError where one differs on which what comes next in the run depends.
    """
    saved = index.run.get("config")
    time = index.run.get("metrics", {}).get("train_time_ms") if isinstance(index.run.get("metrics"), dict) else None
    if not isinstance(saved, dict) or not isinstance(time, int | float):
        raise UserError(f"{folder} was not saved by the trainer: its index says nothing of a run's configuration.")
    before, now = _flat(saved), _flat(json.loads(strict_json.dumps(dataclasses.asdict(config))))
    fixed = {"seed", "data.global_batch", "data.sequence_length", "schedule.stages"}
    if config.schedule.stages:
        fixed |= {"steps", "tokens"}  # stages begin at shares of the run
    changed = []
    for name in sorted(before.keys() & now.keys()):  # a field that only one version has says nothing
        if before[name] == now[name] or (name == KEPT and now[name] == "auto"):
            continue
        section = name.partition(".")[0]
        if name in fixed or (section == "model" and name not in HOW_NOT_WHAT):
            raise UserError(
                f"{folder} is of a run with {name} {before[name]}, and this one has {now[name]}; "
                f"resume with --{name.replace('_', '-')} as it was."
            )
        if section not in NOT_SHOWN and name not in NOT_SHOWN:
            changed.append(f"{name} {before[name]} → {now[name]}")
    of_data = index.run.get("data_hash")
    if of_data != data_hash and older_hash and of_data == older_hash:
        changed.append("data compared by names and sizes alone, as this checkpoint is of an earlier version")
    elif of_data != data_hash:
        raise UserError(
            f"{folder} is of a run on other data ({saved['data']['source']}; the hashes differ): which documents come "
            "next depends on them; resume with that data."
        )
    return tuple(changed)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


class Checkpoints:
    """Saves a run when it is due; a context that sees to it that the last save is done before the run ends.

    about: of the run, to be found again; folder: where to, which only rank 0 need know. Made on all ranks together.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        strategy: Strategy,
        about: dict[str, Any],
        say: Callable[[str], None],
        folder: Path | None,
    ):
        self.every, self.about, self.say = config.checkpoint.every, about, say
        self.stops, self.failed = config.checkpoint.on_failure == "stop", False
        self.about |= {"config": dataclasses.asdict(config)}
        self.about["parameters"] = sum(math.prod(piece.shape) for piece in strategy.optimizer.all_slices())
        self.saver: Saver | None = None
        if self.every:
            self.saver = Saver(
                folder,
                launch.strategy,
                launch.precision,
                strategy.optimizer,
                config.checkpoint.keep,
                config.checkpoint.keep_best,
                strategy.loss_scale,
            )

    def after_step(self, metrics: dict[str, Any], ending: bool) -> None:
        """Save where it is due: every so many steps, and when the run ends or is stopped. All ranks call it alike."""
        if self.saver and (ending or metrics["step"] % self.every == 0):
            self.wait()
            self.failed = False
            self.saver.save(metrics["step"], {**self.about, "metrics": metrics}, metrics.get("val_loss"))

    def wait(self) -> None:
        """Until the last save is done, and say so where it did not succeed."""
        if self.saver:
            self.saver.wait()
            self._look()

    def give_up(self) -> bool:
        """Whether the run is to end because a save has failed. Only rank 0 knows of all ranks' failures."""
        if self.saver and self.saver.done:
            self._look()
        return self.failed and self.stops

    def not_finite(self) -> str:
        """Which value kept a save from being written, in words, because it is not finite: no later step can mend that.
        Empty where none did. Only rank 0 knows of all ranks' values."""
        if self.saver and self.saver.done:
            self._look()
        return self.saver.not_finite or "" if self.saver else ""

    def no_way_on(self, what: str) -> str:
        """The sentence of a run whose state is not finite, with where to go on. what: rank 0's words. Collective."""
        self.wait()
        there_is = "the run keeps no checkpoints (--checkpoint.every)"
        if self.saver and self.saver.place.global_rank == 0:
            found, _ = newest_finite(reversed(of_history(self.saver.folder).values()))
            there_is = f"the last checkpoint that is finite is {found}" if found else "there is no finite checkpoint"
        said = [f"{what}: no later step can mend that; {there_is}. Go on with lower learning rates or a lower clip."]
        if dist.is_initialized():
            dist.broadcast_object_list(said, 0)
        return said[0]

    def _look(self) -> None:
        if self.saver and self.saver.failure:
            self.say(f"warning: {self.saver.failure}")
            self.saver.failure, self.failed = None, True

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After anything else, which one rank may be alone with, others may never finish theirs.
        if error is None or isinstance(error, Stopped | FloatingPointError):
            self.wait()
