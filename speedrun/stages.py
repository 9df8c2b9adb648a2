"""The stage table, resolved from shares of the run to whole steps; and how a stage's global batch is cut over ranks.

No torch in here: the trainer and the verbs that plan for it come to the same rows by the same functions.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    """Rows of one forward pass at most; 0: a rank's whole share."""
    windows: tuple[tuple[int, int], ...]
    """(short, long) attention windows of every stage up to this one, its own last."""
    lr: float
    momentum: float

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.sequence_length


@dataclass(frozen=True)
class Batches:
    """How the global batch of a step is cut: every rank takes the same number of rows, in equal micro-batches."""

    rows: int
    """Of a rank."""
    micro_batch: int
    """Rows of one forward pass."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return self.rows // self.micro_batch

    def micro_batches(self, rank: int) -> list[tuple[int, int]]:
        """The rows [first, last) of the global batch that each forward pass on this rank takes, in order."""
        first = rank * self.rows
        return [(start, start + self.micro_batch) for start in range(first, first + self.rows, self.micro_batch)]


def cut_rows(global_batch: int, world_size: int, micro_batch: int = 0, name: str = "data") -> Batches:
    """Cut a global batch; a micro-batch is the largest divisor of a rank's rows that is at most `micro_batch` (0: all).

    name: of the section that says so, for messages. Raises ValueError where the ranks cannot take equally many rows.
    """
    if global_batch < 1 or global_batch % world_size:
        nearest = max(world_size, round(global_batch / world_size) * world_size)
        raise ValueError(
            f"{name}.global_batch {global_batch} does not divide over {world_size} ranks; use {nearest}, or another "
            "number of processes."
        )
    if micro_batch < 0:
        raise ValueError(f"{name}.micro_batch is {micro_batch}, but must not be negative")
    rows = global_batch // world_size
    most = min(micro_batch or rows, rows)
    return Batches(rows, next(size for size in range(most, 0, -1) if rows % size == 0))


def cut_batches(config: Config, section: Section, world_size: int, engine: Mapping[str, Any] | None = None) -> Batches:
    """How a stage's global batch is cut. engine: the settings of the accelerate config, where there is one.

    Raises ValueError where the batch does not divide, or where the accelerate config sets an accumulation or a clipping
    of its own that contradicts the run's.
    """
    engine, name = engine or {}, section.name
    batches = cut_rows(section.global_batch, world_size, section.micro_batch, name)
    asked = engine.get("gradient_accumulation_steps", 1)  # 1 is what accelerate says where the file says nothing
    if asked not in (1, "auto", batches.accumulation):
        possible = isinstance(asked, int) and asked > 0 and batches.rows % asked == 0
        raise ValueError(
            f"the accelerate config asks for gradient_accumulation_steps {asked}, but {name}.global_batch "
            f"{section.global_batch} over {world_size} ranks in micro-batches of {batches.micro_batch} makes "
            f"{batches.accumulation}; remove it"
            + (f", or set {name}.micro_batch to {batches.rows // asked}." if possible else ".")
        )
    clip = engine.get("gradient_clipping", "auto")
    if clip not in ("auto", config.optimizer.clip):
        raise ValueError(
            f"the accelerate config asks for gradient_clipping {clip}, but optimizer.clip is {config.optimizer.clip}; "
            f"remove the one or pass --optimizer.clip {clip}."
        )
    return batches


def validation_rows(config: Config, sections: Sequence[Section], world_size: int) -> int:
    """Rows of a validation's forward pass on one rank: no more tokens than a training pass of the run has at most, so
    that what there is room to train there is room to validate.
    """
    tokens = [cut_batches(config, s, world_size).micro_batch * s.sequence_length for s in sections]
    return max(1, max(tokens) // (config.data.eval_sequence_length or config.data.sequence_length))


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
    if config.steps < 1:
        raise ValueError(f"steps = {config.steps}: a run has at least one step.")
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
