"""For `shardrun lesson check 4 my_ddp --show`: a step of a capstone, with all that travels and all that is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lessons.capstone.events import watch, watch_modules
from lessons.capstone.levels import Trial
from lessons.capstone.watched import here
from shardrun.certify.equivalence import run_strategy
from shardrun.lesson import called
from shardrun.lesson.messages.recorder import MessageRecorder
from shardrun.own import Own
from shardrun.own.engine import OwnStrategy
from strategies.base import Settings
from strategies.optimizer import Recipe
from strategies.start import Initial, begin

STEPS = 3
"""The last that begins is shown: by the third all has been learned that is learned in the first."""


class _Seen(OwnStrategy):
    """Every step is a call of the recorder's."""

    begun = False

    def prepare(
        self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int, initial: Initial | None = None
    ) -> None:
        begin(model, initial, self.settings.place.device)
        self.steps = 0
        self.recorder: MessageRecorder | None = called.CALLS.recorder
        watch(self._work, model)
        super().prepare(model, recipe, clip, accumulation)
        watch_modules(self._work, model)
        for phase in ("backward", "wait", "norm", "update", "clear"):
            setattr(self.own, phase, self._in_phase(phase, getattr(self.own, phase)))

    def _work(self, what: str) -> None:
        if self.recorder:
            self.recorder.tell(work=what)

    def _in_phase(self, phase: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if self.recorder:
                self.recorder.tell(phase=phase)
            return function(*arguments)

        return call

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if self.recorder and not self.begun:
            self.recorder.begin(f"step {self.steps + 1}")
            self.begun = True
        if self.recorder:
            self.recorder.tell(phase="forward")
        with super().micro_batch(last):
            yield

    def step(self, update: bool = True) -> float:
        norm = super().step(update)
        if self.recorder:
            self.recorder.end()
        self.begun, self.steps = False, self.steps + 1
        return norm


def step(own: Own) -> str:
    """In the form of a level; nothing is graded. Two micro-batches a step."""
    place = here()
    strategy: Any = _Seen(own, Settings(place, "fp32", {}))
    run_strategy(Trial(optimizer="adamw", accumulation=2, steps=STEPS), strategy, place.rank, place.world_size)
    return ""
