"""The entry point: train a preset under whatever strategy the accelerate config file asks for.

    accelerate launch --config_file accelerate_configs/cpu/zero2.yaml -m speedrun.train tiny --steps 100

It reads top to bottom: what was asked for, the data, the model, the strategy, then the loop. Nothing here asks which
strategy it is.

`accumulate` and `loop` are the lesson. Skip at first whatever is asked of `run`: signals, faults, books, checkpoints,
clocks and figures (speedrun/run/context.py); without it the same weights would come out. Skip too `check` (what can be
wrong, and what `auto` becomes), `warm_up` (untimed, and leaves no trace) and `compile_blocks` (off by default).
"""

# ruff: noqa: E402  (imports after a statement)
from speedrun.run.signals import catch

if __name__ == "__main__":
    catch()  # Ctrl-C, SIGTERM and their like, from now on: the imports below take seconds

import sys
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speedrun.config import Config
from speedrun.model import GPT
from speedrun.model.compiling import compile_blocks
from speedrun.optim.policy import parameter_groups
from speedrun.optim.precision import agreed
from speedrun.optim.schedule import adamw_updates, forward_options, learning_rate_multiplier, muon_momentum
from speedrun.run.asked import check_units, honoured, options_said
from speedrun.run.checks import check, check_fields, is_done
from speedrun.run.command_line import parse
from speedrun.run.context import Batch, Run
from speedrun.run.ending import guarded
from speedrun.run.writer import one_writer
from speedrun.stages import Stage
from strategies import select
from strategies.base import Strategy
from strategies.loss_scale import unmoved
from strategies.select import Launch


def main() -> None:
    """Parse the command line and train."""
    preset, config = parse(sys.argv[1:])
    launch = select.launched()
    check_units(launch.engine.get("wrap", ()), launch.config_file)
    said = options_said(sys.argv[1:])
    train(preset, honoured(config, launch.asks, launch.world_size, said), launch, said)


def train(preset: str, config: Config, launch: Launch, said: Collection[str] = ()) -> None:
    """A whole run. Everything that a user can get wrong is checked before a process group starts.

    said: the fields that the command line sets.
    """
    check_fields(config)
    with one_writer(preset, config, launch) as home:  # the run's folder, and nobody else trains there
        checked = check(config, launch, said)
        if is_done(checked, launch):
            return
        config, stages, data = checked.config, checked.stages, checked.data

        torch.manual_seed(config.seed)  # nothing of ours draws from it, but its state is part of a checkpoint
        with torch.device("meta"):  # its parameters get memory and values in `prepare`: a rank's own share, if sharded
            model = GPT(config.model, document_start=data.document_start)
        if config.compile:
            compile_blocks(model, launch.cpu)

        with Run(preset, checked, launch, home) as run:
            strategy = select.start(launch, config.collective_timeout)
            recipe = parameter_groups(checked.shapes, agreed(config.optimizer), config.model.kernels)
            clip, accumulation = config.optimizer.clip, stages[0].batches.accumulation
            strategy.prepare(model, recipe, clip, accumulation, model.initial(config.seed))
            run.begin(strategy)
            warm_up(strategy, model, run)
            loop(strategy, model, run)


def accumulate(strategy: Strategy, forward: Callable[..., Tensor], batch: Batch, options: dict[str, Any]) -> Tensor:
    """Forward and backward passes of this rank's micro-batches, one after the other: their gradients add up. Gradients
    travel between ranks at the last one only, where the strategy allows it.

    forward: tokens and targets, int64 [rows, length], and options → their mean loss. Returns the mean of those over the
    micro-batches, a float32 scalar on the device.
    """
    device = strategy.optimizer.place.device
    mean = torch.zeros((), device=device)
    for i, tensors in enumerate(batch):
        inputs, targets = (tensor.to(device, non_blocking=True) for tensor in tensors)
        with strategy.micro_batch(last=i == len(batch) - 1):
            loss = forward(inputs, targets, **options)
            strategy.backward(loss)
        mean += loss.detach() / len(batch)
    return mean


def loop(strategy: Strategy, model: GPT, run: Run) -> None:
    """Every step of the run: schedules, passes, update."""
    for step, stage, batch in run.steps():
        if step == stage.first:
            enter(stage, strategy, model)
        rate = set_schedules(strategy, run.config, step, run.total_steps, stage)
        options = forward_options(run.config, step, run.total_steps)
        with run.step() as forward:  # the strategy's model; in a step that is counted, the books' view of it
            loss = accumulate(strategy, forward, batch, options)
            norm = strategy.step(update=run.allows(loss))
        run.done(loss, norm, rate, repeat=partial(accumulate, strategy, strategy.model, batch, options))


def enter(stage: Stage, strategy: Strategy, model: GPT) -> None:
    """From now on train as this stage does."""
    model.set_windows(stage.windows)
    strategy.set_accumulation(stage.batches.accumulation)


def set_schedules(strategy: Strategy, config: Config, step: int, steps: int, stage: Stage) -> float:
    """Put this step's learning rates and momentum into the optimizer; returns the multiplier."""
    multiplier = learning_rate_multiplier(config.schedule, step, steps) * stage.lr
    for group in strategy.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
        if "momentum" in group:
            group["momentum"] = muon_momentum(config.optimizer, step, steps, stage.momentum)
        else:
            group["update"] = adamw_updates(config.optimizer, step)
    return multiplier


def warm_up(strategy: Strategy, model: GPT, run: Run) -> None:
    """Untimed steps on the first batch of every stage, so that none of them is slow for being the first."""
    options = forward_options(run.config, 0, run.total_steps)
    for stage in run.stages:
        enter(stage, strategy, model)
        passes = partial(accumulate, strategy, strategy.model, run.batch(stage.first), options)
        untimed_steps(strategy, run.untimed_steps, passes)
    enter(run.first_stage, strategy, model)


def untimed_steps(strategy: Strategy, steps: int, passes: Callable[[], Tensor]) -> None:
    """Steps that leave no trace: with learning rates of zero no weight moves, and the state is dropped after.

    They pay for what the first step of a process pays once: allocations, buckets, traces, compilation.
    """
    with unmoved(strategy.loss_scale):
        for _ in range(steps):
            for group in strategy.optimizer.param_groups:
                group["lr"] = 0.0
            passes()
            strategy.step()
    strategy.optimizer.reset()


if __name__ == "__main__":
    guarded(main)
