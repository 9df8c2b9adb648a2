"""The stage table, resolved from shares of the run to whole steps; and how a stage's global batch is cut over ranks.

No torch in here: the trainer and the verbs that plan for it come to the same rows by the same functions.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from speedrun.config import Config, StageConfig
from strategies.errors import UserError

YARN_SHRINKS_LESS = 148
"""Times that a long window may shrink from one stage to the next under YaRN: e⁵, where its scale would be zero."""


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
        raise UserError(
            f"{name}.global_batch {global_batch} does not divide over {world_size} ranks; use {nearest}, or another "
            "number of processes."
        )
    rows = global_batch // world_size
    most = min(micro_batch or rows, rows)
    return Batches(rows, next(size for size in range(most, 0, -1) if rows % size == 0))


@dataclass(frozen=True)
class Stage:
    """A part of a run of known length, from a line of the stage table: every field is filled in."""

    name: str
    """For messages: `schedule.stages.0`, or `data` where there is no table."""
    first: int
    last: int
    """Its steps are [first, last)."""
    global_batch: int
    sequence_length: int
    micro_batch: int
    """Rows of one forward pass at most; 0: a rank's whole share."""
    windows: tuple[tuple[int, int], ...]
    """(short, long) attention windows of every stage up to this one, its own last."""
    lr: float
    momentum: float
    world_size: int
    """Ranks that the global batch is cut over."""
    batches: Batches = field(init=False)
    """How it is cut."""

    def __post_init__(self) -> None:
        """Raises ValueError where the batch does not divide."""
        batches = cut_rows(self.global_batch, self.world_size, self.micro_batch, self.name)
        object.__setattr__(self, "batches", batches)  # of a frozen dataclass

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.sequence_length


def validation_rows(config: Config, stages: Sequence[Stage]) -> int:
    """Rows of a validation's forward pass on one rank: no more tokens than a training pass of the run has at most, so
    that what there is room to train there is room to validate.
    """
    most = max(stage.batches.micro_batch * stage.sequence_length for stage in stages)
    return max(1, most // (config.data.eval_sequence_length or config.data.sequence_length))


def resolve_stages(config: Config, steps: int, world_size: int = 1) -> list[Stage]:
    """The run's stages, in order; one that holds for all of it where the table is empty.

    A batch depends on the table and on `steps` too, since they say which tokens earlier stages took.

    Raises ValueError where the table is no table, has a stage without steps, or a batch that does not divide.
    """
    table = _table(config)
    stages: list[Stage] = []
    windows: list[tuple[int, int]] = []
    for i, (line, (first, last)) in enumerate(zip(table, itertools.pairwise(_bounds(table, steps)), strict=True)):
        if first == last:
            raise UserError(
                f"schedule.stages.{i} (until {line.until}) has no step in a run of {steps} steps: take more steps, or "
                "stages out"
            )
        model, data = config.model, config.data
        windows.append((line.window_short or model.window_short, line.window_long or model.window_long))
        if model.yarn and len(windows) > 1 and windows[-1][1] * YARN_SHRINKS_LESS < windows[-2][1]:
            raise UserError(
                f"schedule.stages.{i}.window_long is {windows[-1][1]} after {windows[-2][1]}, and model.yarn scales "
                f"attention by 0.2·ln(new / old) + 1, which is not above 0 there: shrink the window less than "
                f"{YARN_SHRINKS_LESS}-fold, or switch model.yarn off"
            )
        stages.append(
            Stage(
                name=f"schedule.stages.{i}" if config.schedule.stages else "data",
                first=first,
                last=last,
                global_batch=line.global_batch or data.global_batch,
                sequence_length=line.sequence_length or data.sequence_length,
                micro_batch=line.micro_batch or data.micro_batch,
                windows=tuple(windows),
                lr=line.lr,
                momentum=config.optimizer.muon_momentum if line.momentum is None else line.momentum,
                world_size=world_size,
            )
        )
    return stages


def check_lengths(config: Config, stages: Sequence[Stage]) -> None:
    """Raises UserError where the model does not take rows as long as those of a stage, or of a validation."""
    longest = max(config.data.eval_sequence_length, *(stage.sequence_length for stage in stages))
    if longest > config.model.max_sequence_length:
        raise UserError(
            f"rows of {longest} tokens (sequence_length, eval_sequence_length of data and stages) exceed "
            f"model.max_sequence_length {config.model.max_sequence_length}; raise the latter."
        )


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The one that `step` belongs to."""
    return next(stage for stage in stages if step < stage.last)


def tokens_before(stages: Sequence[Stage], step: int) -> int:
    """Tokens of the steps before `step`."""
    return sum((min(s.last, step) - s.first) * s.tokens_per_step for s in stages if s.first < step)


def number_of_steps(config: Config) -> int:
    """Steps until the step count or the token budget ends the run. Raises ValueError where that is none."""
    table = _table(config)
    per_step = [
        (stage.global_batch or config.data.global_batch) * (stage.sequence_length or config.data.sequence_length)
        for stage in table
    ]

    def tokens(steps: int) -> int:
        bounds = itertools.pairwise(_bounds(table, steps))
        return sum((last - first) * size for (first, last), size in zip(bounds, per_step, strict=True))

    if config.tokens is None:
        return config.steps
    # A stage's bound is rounded to a step, so many steps take at least this, and fewer are looked at one by one.
    shares = [b - a for a, b in itertools.pairwise([0.0, *(stage.until for stage in table)])]
    mean = sum(share * size for share, size in zip(shares, per_step, strict=True))
    most = (config.tokens + sum(per_step)) / mean
    for steps in range(min(config.steps, math.ceil(most)), 0, -1):
        if tokens(steps) <= config.tokens:
            return steps
    raise UserError(f"steps {config.steps} and a token budget of {config.tokens} allow no step of {tokens(1)} tokens.")


def _table(config: Config) -> Sequence[StageConfig]:
    stages = config.schedule.stages or (StageConfig(),)
    ends = [0.0, *(stage.until for stage in stages)]
    if ends[-1] != 1.0 or any(a >= b for a, b in itertools.pairwise(ends)):
        raise UserError(
            f"schedule.stages end at {', '.join(map(str, ends[1:]))} of the run (until): they must rise from above 0 "
            "to 1"
        )
    for i, stage in enumerate(stages):
        if stage.window_long and not config.model.long_layers:
            raise UserError(
                f"schedule.stages.{i}.window_long = {stage.window_long} has no layer: name some in model.long_layers"
            )
    return stages


def _bounds(stages: Sequence[StageConfig], steps: int) -> list[int]:
    """First steps of all stages, and the end."""
    return [0, *(round(stage.until * steps) for stage in stages)]
