"""The stage table: what of a run changes in steps, resolved from shares of the run to whole steps. No torch in here."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from speedrun.config import Config, Stage


@dataclass(frozen=True)
class Section:
    """A stage of a run of known length: steps [first, last), with every field of the table filled in."""

    name: str
    """For messages: `schedule.stages.0`, or `data` where there is no table."""
    first: int
    last: int
    global_batch: int
    sequence_length: int
    micro_batch: int
    windows: tuple[tuple[int, int], ...]
    """(short, long) attention windows of every stage up to this one, its own last."""
    lr: float
    momentum: float

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.sequence_length


def resolve(config: Config, steps: int) -> list[Section]:
    """The run's stages, in order; one that holds for all of it where the table is empty.

    A batch depends on the table and on `steps` too, since they say which tokens earlier stages took.

    Raises ValueError where the table is no table, or has a stage without steps.
    """
    stages = _stages(config)
    sections: list[Section] = []
    windows: list[tuple[int, int]] = []
    for i, (stage, (first, last)) in enumerate(zip(stages, itertools.pairwise(_bounds(stages, steps)), strict=True)):
        if first == last:
            raise ValueError(
                f"schedule.stages.{i} (until {stage.until}) has no step in a run of {steps} steps: take more steps, or "
                "stages out"
            )
        model, data = config.model, config.data
        windows.append((stage.window_short or model.window_short, stage.window_long or model.window_long))
        sections.append(
            Section(
                name=f"schedule.stages.{i}" if config.schedule.stages else "data",
                first=first,
                last=last,
                global_batch=stage.global_batch or data.global_batch,
                sequence_length=stage.sequence_length or data.sequence_length,
                micro_batch=stage.micro_batch or data.micro_batch,
                windows=tuple(windows),
                lr=stage.lr,
                momentum=config.optimizer.muon_momentum if stage.momentum is None else stage.momentum,
            )
        )
    return sections


def section_at(sections: Sequence[Section], step: int) -> Section:
    """The one that `step` belongs to."""
    return next(section for section in sections if step < section.last)


def tokens_before(sections: Sequence[Section], step: int) -> int:
    """Tokens of the steps before `step`."""
    return sum((min(s.last, step) - s.first) * s.tokens_per_step for s in sections if s.first < step)


def number_of_steps(config: Config) -> int:
    """Steps until the step count or the token budget ends the run. Raises ValueError where that is none."""
    stages = _stages(config)
    per_step = [
        (stage.global_batch or config.data.global_batch) * (stage.sequence_length or config.data.sequence_length)
        for stage in stages
    ]

    def tokens(steps: int) -> int:
        bounds = itertools.pairwise(_bounds(stages, steps))
        return sum((last - first) * size for (first, last), size in zip(bounds, per_step, strict=True))

    budget = config.tokens
    for steps in range(config.steps, 0, -1):
        if budget is None or tokens(steps) <= budget:
            return steps
    raise ValueError(f"steps {config.steps} and a token budget of {config.tokens} allow no step of {tokens(1)} tokens.")


def _stages(config: Config) -> Sequence[Stage]:
    stages = config.schedule.stages or (Stage(),)
    ends = [0.0, *(stage.until for stage in stages)]
    if ends[-1] != 1.0 or any(a >= b for a, b in itertools.pairwise(ends)):
        raise ValueError(
            f"schedule.stages end at {', '.join(map(str, ends[1:]))} of the run (until): they must rise from above 0 "
            "to 1"
        )
    for i, stage in enumerate(stages):
        for field in ("global_batch", "sequence_length", "micro_batch", "window_short", "window_long", "lr"):
            if getattr(stage, field) < 0:
                raise ValueError(f"schedule.stages.{i}.{field} is {getattr(stage, field)}, but must not be negative")
        if stage.window_long and not config.model.long_layers:
            raise ValueError(
                f"schedule.stages.{i}.window_long = {stage.window_long} has no layer: name some in model.long_layers"
            )
    return stages


def _bounds(stages: Sequence[Stage], steps: int) -> list[int]:
    """First steps of all stages, and the end."""
    return [0, *(round(stage.until * steps) for stage in stages)]
