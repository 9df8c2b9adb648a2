"""A run while it goes on: its folder and display, signals and faults, books, checkpoints, clocks and figures.

The loop tells it of each step, and knows nothing of all that.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.books.measured import Books, counted_step, further_steps
from speedrun.data import prefetch
from speedrun.data.shards import DataChangedError
from speedrun.evaluate import BrokenOff, evaluate
from speedrun.run.checkpoints import Checkpoints
from speedrun.run.checks import Checked, switch_on
from speedrun.run.ending import DataLost, Peers, as_exception, outcome
from speedrun.run.faults import Faults, first_nonfinite, loss_comes_first
from speedrun.run.folder import RunFolder
from speedrun.run.progress import Progress
from speedrun.run.signals import listening
from speedrun.run.writer import Home
from speedrun.stages import Stage, stage_at, tokens_before, validation_rows
from strategies.base import Strategy
from strategies.select import Launch, bound_collectives

Batch = list[tuple[Tensor, Tensor]]
"""A step's micro-batches on one rank: tokens and targets, int64 [rows, length], on the CPU."""


class Run:
    """Around a run; however that ends, the folder says so.

    with Run(preset, checked, launch) as run:
        …
        run.begin(strategy)
        for step, stage, batch in run.steps():
            with run.step() as forward:
                loss = …
                norm = strategy.step(update=run.allows(loss))
            run.done(loss, norm, rate, repeat)
    """

    def __init__(self, preset: str, checked: Checked, launch: Launch, home: Home):
        """home: the run's folder. Raises FileExistsError where it holds a run already."""
        self.preset, self.checked, self.launch = preset, checked, launch
        self.config, self.stages, self.total_steps = checked.config, checked.stages, checked.steps
        resumed, first = checked.resumed, launch.rank == 0
        self.start = resumed.step if resumed else 0
        self.train_time = resumed.train_time if resumed else 0.0
        """Seconds, of the timed steps."""
        self.timed_steps = resumed.timed_steps if resumed else 0
        self.folder: RunFolder | None = None
        if first:
            data_hash, parameters = checked.data.content_hash, checked.parameters
            self.folder = RunFolder(home.folder, self.config, launch, preset, data_hash, parameters, resumed)
        self.progress = Progress(self.config.progress if first else "none", self.total_steps)
        self.say = self.progress.say
        for line in (*filter(None, [home.note]), _headline(preset, checked, launch), *checked.resolved):
            self.say(line)

    def __enter__(self) -> Self:
        self._open = ExitStack()
        self._open.callback(self.progress.close)
        self._open.push(self._finish)
        self.signals = self._open.enter_context(listening())
        if self.folder:
            self.signals.record = self.folder.note
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def _finish(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The last that is written of a run: how it ended."""
        self.signals.orderly()  # a signal that comes now changes nothing any more
        self.signals.record = self.signals.last_words = None
        if self.folder:
            self.folder.finish(outcome(error, self.signals) if error else "finished", error)
            if not error:
                self.say(f"run: {self.folder.path}")

    def begin(self, strategy: Strategy) -> None:
        """Once the strategy is prepared. Collective."""
        config, data = self.config, self.checked.data
        self.strategy = strategy
        bound_collectives(config.collective_timeout)
        for line in switch_on(self.checked, strategy.optimizer.place.device):
            self.say(line)
        if self.checked.resumed:
            self.checked.resumed.agree()
        about = {"preset": self.preset, "data_hash": data.content_hash, "document_start": data.document_start}
        about |= {"tokens": data.about_tokens()}
        if self.folder:
            about["history"] = self.folder.history.about()
        folder = self.folder.path / "checkpoints" if self.folder else None
        self.checkpoints = Checkpoints(config, self.launch, strategy, about, self.say, folder)
        self.peers = self._open.enter_context(Peers())
        self._open.enter_context(self.checkpoints)
        if self.folder:
            self.signals.last_words = self._last_words
        self.faults = Faults(config, self.say, self.checkpoints.no_way_on)
        self.validation_rows = validation_rows(config, self.stages)
        counted = counted_step(self.total_steps, config.eval_every, self.start)
        stage = stage_at(self.stages, counted)
        self.counted_steps = further_steps(counted, stage.last, config.eval_every, config.books_every)
        self.books = Books(config, self.launch, strategy, stage, loss_comes_first(config))
        self.books.note("after prepare")
        self.updated = False
        """There is optimizer state that the run has made."""

    @property
    def first_stage(self) -> Stage:
        """The one in which this process begins."""
        return stage_at(self.stages, min(self.start, self.total_steps - 1))

    @property
    def untimed_steps(self) -> int:
        """Of each stage, before the clock starts. The first step of a process is special for every engine, so a resumed
        run takes it as a warm-up step."""
        return max(self.config.untimed_steps, 1) if self.start else self.config.untimed_steps

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step, as they are trained."""
        cuts = stage_at(self.stages, step).batches.micro_batches(self.launch.rank)
        return [self.checked.data.batch(step, first, last) for first, last in cuts]

    def steps(self) -> Iterator[tuple[int, Stage, Batch]]:
        """Every step, from where a checkpoint left off, its stage and its batch. Ends at the target too. Collective."""
        self.ended = self.over = False
        if self.start and self.checked.resumed:
            self.checked.resumed.restore(self.strategy, self.say)
            self.updated = True
        for line in self.folder.open() if self.folder else ():
            self.say(line)
        self.faults.before_first(self.strategy)
        if not self.start:
            validation, stopped = self._validate()
            self._log({"step": 0, "tokens": 0, "train_time_ms": 0.0, "timed_steps": 0, **validation})
            if stopped:
                raise stopped
        elif missing := self._validation_missing():
            validation, stopped = self._validate()
            if self.folder:
                self.folder.forget(self.start)
            self._step_over({**missing, **validation}, stopped)
        steps = range(self.start, self.start if self.ended else self.total_steps)
        batches = self._open.enter_context(prefetch(map(self.batch, steps), depth=2))
        for step in steps:
            self.started = time.perf_counter()
            batch = next(batches)
            self.fetched = time.perf_counter()
            self.now, self.peers.step = step, step + 1
            self.counted = step in self.counted_steps
            if self.counted and not self.updated and step > self.start:  # all steps so far were left out
                self.counted = not self._count_later()
            self.watched = self.counted and step > 0  # the first step has no optimizer state before it
            yield step, stage_at(self.stages, step), batch
            if self.ended:
                break
        self._end()

    def _validation_missing(self) -> dict[str, Any]:
        """The line of the step that the run goes on from, where the validation that belongs to it was broken off: it
        is made up for now."""
        index = self.checked.resumed.index if self.checked.resumed else None
        line = index.run["metrics"] if index else {}
        return line if self._is_due(self.start) and "val_loss" not in line else {}

    def _end(self) -> None:
        """After the last step, on all ranks together. Raises NotSaved where the last checkpoint was not written, and
        FloatingPointError where the last step did not count. Collective."""
        self.over = True
        self.checkpoints.wait()
        not_finite, not_saved = self.checkpoints.not_finite(), self.checkpoints.give_up()
        zero = torch.zeros((), device=self.strategy.optimizer.place.device)
        _, bad, failed = mean_over_ranks(zero, bool(not_finite), not_saved)
        if bad:
            raise FloatingPointError(self.checkpoints.no_way_on(not_finite))
        if stopped := as_exception(not_saved=failed):
            raise stopped
        self.faults.at_end()

    @contextmanager
    def step(self) -> Iterator[Callable[..., Tensor]]:
        """Around passes and update. Yields what to call as the model: in a counted step the books watch it."""
        if not self.counted:
            yield self.strategy.model
            return
        with self.books.step():
            yield self.books.forward if self.watched else self.strategy.model

    def allows(self, loss: Tensor) -> bool:
        """Between passes and update: whether the update may be made. Collective where the run looks at every loss."""
        if self.watched:
            self.books.note("after backward")
        return not (self.faults.early and self.faults.refuses(mean_over_ranks(loss)[0]))

    def done(self, loss: Tensor, norm: float, rate: float, repeat: Callable[[], Tensor]) -> None:
        """After a step: everything that is due.

        loss: of this rank; norm: of the gradient; rate: the multiplier of learning rates; repeat: its passes again.

        Raises what ends a run: Stopped and FloatingPointError, on all ranks. Collective.
        """
        done = self.now + 1
        mean, stopped = self._stopped(loss)
        self.signals.orderly()  # all ranks have done a step
        ended = time.perf_counter()
        if self.counted:  # its every operator is watched: no measure of training
            self.books.note("after step")
        else:
            self.train_time += ended - self.started
            self.timed_steps += 1
        # A step that is repeated to name a tensor is not timed either, nor are validation and checkpoints.
        scale, again = self.strategy.loss_scale, partial(first_nonfinite, self.strategy, repeat)
        counts = self.faults.after_step(done, mean, norm, again, scale)
        self.updated = self.updated or counts
        if self.counted and (counts or not self._count_later()):
            self._keep_books(done)
        validation: dict[str, Any] = {}
        if self._is_due(done) and not stopped:
            validation, stopped = self._validate()
        tokens = stage_at(self.stages, self.now).tokens_per_step
        metrics = {
            "step": done,
            "tokens": tokens_before(self.stages, done),
            "train_loss": mean if math.isfinite(mean) else None,
            **validation,
            "lr": rate,
            "grad_norm": norm if counts else None,
            **({} if counts else {"skipped": True}),
            **({"loss_scale": scale.value} if scale else {}),
            "train_time_ms": self.train_time * 1e3,
            "timed_steps": self.timed_steps,
            "step_avg_ms": self.train_time * 1e3 / self.timed_steps if self.timed_steps else None,
            "data_time_ms": (self.fetched - self.started) * 1e3,
            "compute_time_ms": (ended - self.fetched) * 1e3,
            "tokens_per_second": None if self.counted else tokens / (ended - self.started),
            **({"counted": True} if self.counted else {}),
        }
        self._step_over(metrics, stopped)

    def _step_over(self, metrics: dict[str, Any], stopped: BaseException | None) -> None:
        """Write a step down, save it where that is due, and see whether it was the last one. Raises `stopped`."""
        self._log(metrics)
        step, target = metrics["step"], self.config.target_val_loss
        self.ended = target is not None and "val_loss" in metrics and metrics["val_loss"] <= target
        if not isinstance(stopped, FloatingPointError):
            ending = bool(stopped) or step == self.total_steps or self.ended
            self.checkpoints.after_step(metrics, ending)
        if stopped:
            raise stopped
        if self.ended:
            self.say(f"reached the target validation loss {target} at step {step}")

    def _is_due(self, step: int) -> bool:
        """Whether a validation belongs to this step, from 1."""
        every = self.config.eval_every
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _stopped(self, loss: Tensor) -> tuple[float, BaseException | None]:
        """The mean of a loss over all ranks, and what ends the run now on all of them. Collective."""
        lost, not_finite = self._lost_data(), self.checkpoints.not_finite()
        asked = (self.signals.preempted, self.signals.interrupted, self.checkpoints.give_up())
        mean, lost_anywhere, bad, *anywhere = mean_over_ranks(loss, bool(lost), bool(not_finite), *asked)
        if bad:
            return mean, FloatingPointError(self.checkpoints.no_way_on(not_finite))
        if lost_anywhere:
            return mean, DataLost(lost or "another rank's data have changed.")
        return mean, as_exception(*anywhere)

    def _last_words(self, name: str) -> str:
        """What a signal of this name means for the run in this moment; said when it comes."""
        saved = self.checkpoints.saver.saved if self.checkpoints.saver else None
        before = f"the checkpoint of step {saved}" if saved else f"step {self.start}"
        if self.over:
            return "all steps are done, and the run only writes its end."
        if not self.config.checkpoint.every:
            return "the run ends after the step that it is in; it keeps no checkpoints (--checkpoint.every)."
        return (
            "the run ends after the step that it is in, and saves it. If it is killed before (torchrun gives 30 s), "
            f"what came after {before} is lost."
        )

    def _lost_data(self) -> str:
        """What has become of the data, where they are not what they were: in a sentence, else "". Looked at after
        every step, so that all ranks can end after the same one; the next batches may be made already.
        """
        try:
            self.checked.data.check_files()
        except DataChangedError as error:
            return str(error)
        return ""

    def _count_later(self) -> bool:
        """Put the books off to a later step of the same stage, if there is one: a step that was left out sends less
        than one that counts, and before the first that counts there is no optimizer state."""
        last = stage_at(self.stages, self.now).last
        later = further_steps(self.now, last, self.config.eval_every, 1)[1:2]
        self.counted_steps += later
        return bool(later)

    def _keep_books(self, step: int) -> None:
        ranks = self.books.gather()
        if self.folder:
            self.folder.ledger(step, ranks)

    def _validate(self) -> tuple[dict[str, Any], BaseException | None]:
        """A validation, or nothing and what ends the run, where any rank was asked to end while it went on."""
        try:
            result = evaluate(self.strategy, self.checked.data, self.validation_rows, lambda: self.signals.heard)
        except BrokenOff:
            return {}, self._stopped(torch.zeros((), device=self.strategy.optimizer.place.device))[1]
        return {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}, None

    def _log(self, metrics: dict[str, Any]) -> None:
        self.progress.step(metrics)
        if self.folder:
            self.folder.step(metrics)


def mean_over_ranks(loss: Tensor, *signals: float) -> list[float]:
    """The means of a rank's loss and of its signals over all ranks, in one message. Collective."""
    values = torch.cat((loss.reshape(1), loss.new_tensor([float(signal) for signal in signals])))
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values.tolist()


def _headline(preset: str, checked: Checked, launch: Launch) -> str:
    stages, data = checked.stages, checked.data
    accumulation = stages[0].batches.accumulation
    return (
        f"{preset}: {checked.parameters:,} parameters, {launch.strategy} on {launch.world_size} "
        f"{'rank' if launch.world_size == 1 else 'ranks'} ({'cpu' if launch.cpu else 'gpu'}, {launch.precision}), "
        f"{stages[0].global_batch} rows of {stages[0].sequence_length} tokens a step"
        f" ({accumulation} micro-batch{'es' if accumulation > 1 else ''} a rank)"
        f"{f' in the first of {len(stages)} stages' if len(stages) > 1 else ''}, {data.name}: "
        f"{data.train_tokens:,} training tokens"
    )
