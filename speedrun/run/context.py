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
from speedrun.evaluate import evaluate
from speedrun.run.checkpoints import Checkpoints
from speedrun.run.checks import Checked, switch_on
from speedrun.run.ending import DataLost, Interruptible, as_exception, outcome
from speedrun.run.faults import Faults, first_nonfinite, loss_comes_first
from speedrun.run.folder import RunFolder
from speedrun.run.progress import Progress
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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def _finish(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The last that is written of a run: how it ended. Raises NotSaved where its last checkpoint failed."""
        failed = as_exception(not_saved=error is None and self.checkpoints.give_up())
        ended = error or failed
        if self.folder:
            self.folder.finish(outcome(ended) if ended else "finished", ended)
            if not ended:
                self.say(f"run: {self.folder.path}")
        if failed:
            raise failed

    def begin(self, strategy: Strategy) -> None:
        """Once the strategy is prepared. From here on Ctrl-C and SIGTERM end the run after a step. Collective."""
        config, data = self.config, self.checked.data
        self.strategy = strategy
        bound_collectives(config.collective_timeout)
        for line in switch_on(self.checked, strategy.optimizer.place.device):
            self.say(line)
        if self.checked.resumed:
            self.checked.resumed.agree()
        about = {"preset": self.preset, "data_hash": data.content_hash, "document_start": data.document_start}
        if self.folder:
            about["history"] = self.folder.history.about()
        folder = self.folder.path / "checkpoints" if self.folder else None
        self.checkpoints = Checkpoints(config, self.launch, strategy, about, self.say, folder)
        self.interruption = self._open.enter_context(Interruptible())
        self._open.enter_context(self.checkpoints)
        self.faults = Faults(config, self.say)
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
        if self.start and self.checked.resumed:
            self.checked.resumed.restore(self.strategy, self.say)
            self.updated = True
        for line in self.folder.open() if self.folder else ():
            self.say(line)
        if not self.start:
            self._log({"step": 0, "tokens": 0, "train_time_ms": 0.0, "timed_steps": 0, **self._validate()})
        self.ended = False
        steps = range(self.start, self.total_steps)
        batches = self._open.enter_context(prefetch(map(self.batch, steps), depth=2))
        for step in steps:
            self.started = time.perf_counter()
            batch = next(batches)
            self.fetched = time.perf_counter()
            self.now, self.interruption.step = step, step + 1
            self.counted = step in self.counted_steps
            if self.counted and not self.updated and step > self.start:  # all steps so far were left out
                self.counted = not self._count_later()
            self.watched = self.counted and step > 0  # the first step has no optimizer state before it
            yield step, stage_at(self.stages, step), batch
            if self.ended:
                return

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
        done, config = self.now + 1, self.config
        asked = (self.interruption.preempted, self.interruption.interrupted, self.checkpoints.give_up())
        lost = self._lost_data()
        mean, lost_anywhere, *anywhere = mean_over_ranks(loss, bool(lost), *asked)
        stopped = DataLost(lost or "another rank's data have changed.") if lost_anywhere else as_exception(*anywhere)
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
        last = done == self.total_steps
        due = last or (config.eval_every and done % config.eval_every == 0)
        validation = self._validate() if due and not stopped else {}
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
        self._log(metrics)
        target = config.target_val_loss
        self.ended = target is not None and bool(validation) and validation["val_loss"] <= target
        self.checkpoints.after_step(metrics, ending=bool(stopped) or last or self.ended)
        if stopped:
            raise stopped
        if self.ended:
            self.say(f"reached the target validation loss {target} at step {done}")

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

    def _validate(self) -> dict[str, Any]:
        result = evaluate(self.strategy, self.checked.data, self.validation_rows)
        return {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}

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
