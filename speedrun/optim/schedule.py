"""Schedules as data: learning-rate multiplier, Muon's momentum, what the loss is, as pure functions of the step."""

import math
from typing import Any

from speedrun.config import Config, OptimizerConfig, ScheduleConfig

COSINE_FLOOR = 0.1
"""Where cosine_warmdown's cosine ends and its line begins, as a share of the way from 1 to `final`."""


def learning_rate_multiplier(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor on every peak learning rate at `step` (0 … steps − 1) of a run of `steps`.

    All schedules start with `warmup` steps of linear warm-up. After it: *constant* stays at 1; *linear* falls to
    `final` in a line; *cosine* falls to it in half a cosine (Loshchilov and Hutter, arXiv 1608.03983); *trapezoid*
    stays at 1 and falls in a line over the last `decay` of the run (also called warm-up–stable–decay);
    *cosine_warmdown* goes nine tenths of the way in half a cosine, and the last tenth in a line over the last `decay`
    of the run. `final` is the value at `steps`, one step after the last: a last step at a rate of zero would be wasted.
    """
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    if config.name == "constant":
        return 1.0
    warm_down = max(config.warmup, steps - round(config.decay * steps))
    if config.name == "cosine_warmdown":
        cosine = 0.5 * (1 + math.cos(math.pi * _progress(config.warmup, warm_down, step)))
        shape = COSINE_FLOOR + (1.0 - COSINE_FLOOR) * cosine
        shape -= COSINE_FLOOR * _progress(warm_down, steps, step)
    elif config.name == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * _progress(config.warmup, steps, step)))
    else:
        shape = 1.0 - _progress(warm_down if config.name == "trapezoid" else config.warmup, steps, step)
    return config.final + (1.0 - config.final) * shape


def _progress(first: int, last: int, step: int) -> float:
    """How far `step` is on the way from `first` to `last`, from 0 to 1."""
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))


def muon_momentum(config: OptimizerConfig, step: int, steps: int, full: float | None = None) -> float:
    """Muon's momentum at `step` of `steps`: linear from its start to its full value over the warm-up, and linear back
    over the cool-down (where the two meet, whichever is lower). full: the stage's, else the configuration's.
    """
    warm = step / config.muon_momentum_warmup if config.muon_momentum_warmup else 1.0
    cool = (steps - step) / config.muon_momentum_cooldown if config.muon_momentum_cooldown else 1.0
    full = config.muon_momentum if full is None else full
    return config.muon_momentum_start + min(1.0, warm, cool) * (full - config.muon_momentum_start)


def adamw_updates(config: OptimizerConfig, step: int) -> bool:
    """Whether AdamW updates at `step` (from 0) or only adds its gradient up: it ends every `adamw_every` steps."""
    return (step + 1) % config.adamw_every == 0


def future_weights(config: ScheduleConfig, step: int, steps: int) -> tuple[float, ...]:
    """The weights, in the loss at `step`, of the tokens after the next one; without those that have faded to zero.

    With two of them a run has three equal parts: in the first the second weight falls to zero in a line, in the second
    the first weight does, in the third the loss is the plain one.
    """
    given = config.future_weights
    part, progress = divmod(step * (len(given) + 1) / steps, 1.0)
    live = given[: len(given) - int(part)]
    return (*live[:-1], live[-1] * (1.0 - progress)) if live else ()


def forward_options(config: Config, step: int, steps: int) -> dict[str, Any]:
    """What the model is told at `step`, beside tokens and targets; an evaluation leaves it out."""
    return {
        "future_weights": future_weights(config.schedule, step, steps),
        "tied": step < config.model.untie_at * steps,
    }
