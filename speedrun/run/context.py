"""A run while it goes on: its folder and display, signals and faults, books, checkpoints, clocks and figures.

The loop tells it of each step, and knows nothing of all that.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
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
from speedrun.run.progress import Progress, headline
from speedrun.run.signals import listening
from speedrun.run.unread import Allowance, Figures, Taken, mean_over_ranks, over_ranks
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

    reads_late = ("cuda",)
    """Devices for which the host would wait."""

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
        for line in (*filter(None, [home.note]), headline(preset, checked, launch), *checked.resolved):
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
        self.allowance = Allowance(config.spike, strategy.optimizer.place.device)
        self.unread: Taken | None = None
        self.stop: BaseException | None = None
        """What will end the run after the step that was started before it was known."""
        self.late = False
        """Figures are read a step later."""

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
        rows = [self.checked.data.batch(step, first, last) for first, last in cuts]
        # Only of pinned memory a GPU gets copies that nobody waits for.
        return rows if self.launch.cpu else [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in rows]

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
        for step, batch in self._each(steps, batches):
            self.now, self.peers.step = step, step + 1
            self.counted = step in self.counted_steps
            if self.counted and not self.updated and step > self.start:  # all steps so far were left out
                self.counted = not self._count_later()
            self.watched = self.counted and step > 0  # the first step has no optimizer state before it
            yield step, stage_at(self.stages, step), batch
            if self.ended:
                break
        self._end()

    def _each(self, steps: Iterable[int], batches: Iterator[Batch]) -> Iterator[tuple[int, Batch]]:
        """Every step and its batch; once more where the device has left it out for the one before."""
        self.again = False
        for step in steps:
            self.started = time.perf_counter()
            batch = next(batches)
            self.fetched = time.perf_counter()
            yield step, batch
            while self.again:
                self.again = False
                self.started = self.fetched = time.perf_counter()
                yield step, batch

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

    def allows(self, loss: Tensor) -> Tensor:
        """Between passes and update: whether it may be made, a boolean scalar. Collective where a loss matters."""
        if self.watched:
            self.books.note("after backward")
        self.allowed = self.allowance.allows(over_ranks(loss)[0] if self.faults.early else None)
        return self.allowed

    def done(self, loss: Tensor, norm: float | Tensor, rate: float, repeat: Callable[[], Tensor]) -> None:
        """After a step: everything that is due. On a GPU that is what the step before has left: this one's figures are
        read a step later, unless something hangs on them. Where the step before did not count, the device has left
        this one out as well, and `steps` gives it again.

        loss: of this rank; norm: of the gradient; rate: the multiplier of learning rates; repeat: its passes again.

        Raises what ends a run: Stopped and FloatingPointError, on all ranks. Collective.
        """
        taken = Taken(self.now, self._send(loss, norm), rate, repeat, self.started, self.fetched)
        before, self.unread = self.unread, None
        if before and not self._look_at(before, later=True):
            self.allowance.looked()
            self.again = True
            return
        ended = time.perf_counter()
        if self.late and not self.stop and not self._hangs_on(taken):
            self._timed(taken, ended)
            self.unread = taken
            return
        self._look_at(taken)
        self.allowance.looked()

    def _send(self, loss: Tensor, norm: float | Tensor) -> Figures:
        """Let a step's figures go to the host: what `_signalled` says, and the norm. Collective."""
        mean = self._signalled(loss)
        here = norm if isinstance(norm, Tensor) else mean.new_full((), norm)
        self.allowance.over(mean[0], self.allowed & here.isfinite())
        self.late = mean.device.type in self.reads_late and isinstance(norm, Tensor)
        return Figures(torch.cat((mean, here.reshape(1).to(mean.dtype))))

    def _signalled(self, loss: Tensor) -> Tensor:
        """The mean loss over all ranks, and what any of them signals, as `_ends` takes it. Collective."""
        lost, not_finite = self._lost_data(), self.checkpoints.not_finite()
        asked = (self.signals.preempted, self.signals.interrupted, self.checkpoints.give_up())
        self.said = (not_finite, lost)
        return over_ranks(loss, (bool(lost), bool(not_finite), *asked))

    def _hangs_on(self, taken: Taken) -> bool:
        """Whether what comes next needs this step's figures: validation, checkpoint, books, another stage, the end."""
        done, every = taken.step + 1, self.config.checkpoint.every
        saves, counted = every > 0 and done % every == 0, self.counted or done in self.counted_steps
        return self._is_due(done) or saves or counted or stage_at(self.stages, done).first == done

    def _timed(self, taken: Taken, ended: float) -> None:
        if taken.ended:
            return
        taken.ended = ended
        if not self.counted:  # else its every operator was watched: no measure of training
            self.train_time += ended - taken.started
            self.timed_steps += 1
        taken.train_time, taken.timed_steps = self.train_time, self.timed_steps

    def _look_at(self, taken: Taken, later: bool = False) -> bool:
        """Read a step's figures, and do what is due; returns whether the step counts. later: another one was started
        since, for which what ends the run has to wait."""
        mean, *flags, norm = taken.figures.read()
        stopped = self._ends(*flags)
        self.signals.orderly()  # all ranks have done a step
        self._timed(taken, time.perf_counter())
        counted = self.counted and not later
        if counted:
            self.books.note("after step")
        # A step that is repeated to name a tensor is not timed either, nor are validation and checkpoints.
        done, scale = taken.step + 1, self.strategy.loss_scale
        again = partial(first_nonfinite, self.strategy, taken.repeat)
        counts = self.faults.after_step(done, mean, norm, again, scale)
        self.updated = self.updated or counts
        if counted and (counts or not self._count_later()):
            self._keep_books(done)
        validation: dict[str, Any] = {}
        stopped = stopped or self.stop
        if later and counts:
            self.stop, stopped = stopped, None
        if self._is_due(done) and not stopped:
            validation, stopped = self._validate()
        tokens = stage_at(self.stages, taken.step).tokens_per_step
        metrics = {
            "step": done,
            "tokens": tokens_before(self.stages, done),
            "train_loss": mean if math.isfinite(mean) else None,
            **validation,
            "lr": taken.rate,
            "grad_norm": norm if counts else None,
            **({} if counts else {"skipped": True}),
            **({"loss_scale": scale.value} if scale else {}),
            **taken.times(),
            "tokens_per_second": None if counted else tokens / (taken.ended - taken.started),
            **({"counted": True} if counted else {}),
        }
        self._step_over(metrics, stopped)
        return counts

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

    def _ends(self, lost: float, bad: float, *asked: float) -> BaseException | None:
        """What ends the run now on all ranks, from what any of them signals. Collective where something does."""
        not_finite, lost_here = self.said
        if bad:
            return FloatingPointError(self.checkpoints.no_way_on(not_finite))
        if lost:
            return DataLost(lost_here or "another rank's data have changed.")
        return as_exception(*asked)

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
            zero = torch.zeros((), device=self.strategy.optimizer.place.device)
            return {}, self._ends(*self._signalled(zero)[1:].tolist())
        return {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}, None

    def _log(self, metrics: dict[str, Any]) -> None:
        self.progress.step(metrics)
        if self.folder:
            self.folder.step(metrics)
