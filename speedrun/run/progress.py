"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedrun.run.checks import Checked
    from strategies.select import Launch


def describe(metrics: dict[str, Any], steps: int) -> str:
    """One step as a line, in the form that the public speedrun logs use."""
    parts = [f"step:{metrics['step']}/{steps}"]
    if metrics.get("train_loss") is not None:
        parts.append(f"train_loss:{metrics['train_loss']:.4f}")
    if metrics.get("val_loss") is not None:
        parts.append(f"val_loss:{metrics['val_loss']:.4f}")
        if metrics.get("val_bits_per_byte") is not None:
            parts.append(f"bits_per_byte:{metrics['val_bits_per_byte']:.4f}")
    parts.append(f"train_time:{metrics['train_time_ms']:.0f}ms")
    if metrics.get("step_avg_ms") is not None:
        parts.append(f"step_avg:{metrics['step_avg_ms']:.2f}ms")
    if metrics.get("counted"):
        parts.append("(counted for the books, not timed)")
    return " ".join(parts)


class Progress:
    """Shows steps on rank 0. mode: 'live' (rich), 'plain', 'none', or 'auto' by whether stdout is a terminal."""

    def __init__(self, mode: str, steps: int):
        self.steps = steps
        self.mode = ("live" if sys.stdout.isatty() else "plain") if mode == "auto" else mode
        self.every = max(1, steps // 20)
        self._live: Any = None
        if self.mode == "live":
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._live = RichProgress(
                MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            )
            self._task = self._live.add_task("starting", total=steps)
            self._live.start()

    def say(self, text: str) -> None:
        """A line of its own, in every mode but 'none'."""
        if self._live:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.mode == "plain":
            print(text, flush=True)

    def step(self, metrics: dict[str, Any]) -> None:
        """Every step moves the bar; a validation, and in plain mode every twentieth of the run, leaves a line."""
        line = describe(metrics, self.steps)
        if self._live:
            self._live.update(self._task, completed=metrics["step"], description=line.partition(" ")[2])
        if metrics.get("val_loss") is not None or (self.mode == "plain" and metrics["step"] % self.every == 0):
            self.say(line)

    def close(self) -> None:
        if self._live:
            self._live.stop()


def headline(preset: str, checked: Checked, launch: Launch) -> str:
    """What a run is, in a line."""
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
