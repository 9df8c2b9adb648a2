"""The entry point: train a preset under whatever strategy the accelerate config file asks for.

    accelerate launch --config_file accelerate_configs/cpu/zero2.yaml -m speedrun.train tiny --steps 100

It reads top to bottom: what was asked for, the data, the model, the strategy, then the loop. Nothing here asks which
strategy it is.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.config import PRESETS, Config
from speedrun.data import Data, open_data, prefetch
from speedrun.evaluate import Validation, evaluate
from speedrun.model import GPT
from speedrun.optim.policy import parameter_groups
from speedrun.optim.schedule import learning_rate_multiplier, muon_momentum
from speedrun.progress import Progress
from speedrun.record import Record
from strategies import select
from strategies.base import Strategy
from strategies.ledger.memory import measure
from strategies.select import Launch

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError)
"""What a user's mistake raises, with a sentence to show in place of a traceback."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """How the global batch of a step is cut: this rank's rows, in micro-batches."""

    first: int
    rows: int
    accumulation: int


def main(arguments: list[str] | None = None) -> None:
    """Run, and end this process: with status 0, 2 after a user's mistake, 130 after Ctrl-C, 1 otherwise."""
    arguments = sys.argv[1:] if arguments is None else arguments
    status = 0
    try:
        preset, config = parse(arguments)
        train(preset, config, select.launched())
    except USER_ERRORS as error:
        status = 2
        _report(f"shardrun: error: {error}")
    except KeyboardInterrupt:
        status = 130
        _report("shardrun: interrupted; the run's folder holds everything up to its last step.")
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        if status == 0:
            dist.barrier()
            dist.destroy_process_group()
        # gloo's threads now and then abort a process that ends in the ordinary way; all files are closed by now.
        os._exit(status)
    sys.exit(status)


def parse(arguments: list[str]) -> tuple[str, Config]:
    """`[PRESET] [--section.field value …]` → the preset's name and the whole configuration."""
    import tyro

    if not arguments or arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments = ["tiny", *arguments]
    config = tyro.extras.overridable_config_cli(
        PRESETS, prog="accelerate launch … -m speedrun.train", description=__doc__, args=arguments
    )
    return arguments[0], config


def train(preset: str, config: Config, launch: Launch) -> None:
    """A whole run. Everything that a user can get wrong is checked before a process group starts."""
    batches = cut_batches(config, launch)
    data = open_data(config.data, config.model.vocab_size, config.seed)
    steps = number_of_steps(config)
    if config.data.sequence_length > config.model.max_sequence_length:
        raise ValueError(
            f"data.sequence_length {config.data.sequence_length} exceeds model.max_sequence_length "
            f"{config.model.max_sequence_length}; raise the latter."
        )
    model = GPT(config.model, document_start=data.document_start)
    model.init_weights(config.seed)
    parameters = sum(p.numel() for p in model.parameters())
    recipe = parameter_groups({name: tuple(p.shape) for name, p in model.named_parameters()}, config.optimizer)

    strategy = select.start(launch)
    strategy.prepare(model, recipe, clip=config.optimizer.clip, accumulation=batches.accumulation)

    record = Record(config, launch, preset, data.content_hash, parameters) if launch.rank == 0 else None
    progress = Progress(config.progress if launch.rank == 0 else "none", steps)
    progress.say(_headline(preset, config, launch, batches, data, parameters))
    try:
        _loop(strategy, config, data, batches, steps, record, progress)
    except BaseException as error:
        if record:
            interrupted = isinstance(error, KeyboardInterrupt)
            record.finish("interrupted" if interrupted else "failed", None if interrupted else str(error))
        raise
    finally:
        progress.close()
    if record:
        record.finish("finished")
        print(f"run: {record.folder}", flush=True)


def _loop(
    strategy: Strategy,
    config: Config,
    data: Data,
    batches: Batches,
    steps: int,
    record: Record | None,
    progress: Progress,
) -> None:
    rows = batches.rows // batches.accumulation
    tokens_per_step = config.data.global_batch * config.data.sequence_length
    device = strategy.optimizer.place.device

    def micro_batches(step: int) -> list[tuple[Tensor, Tensor]]:
        starts = range(batches.first, batches.first + batches.rows, rows)
        return [data.batch(step, start, start + rows) for start in starts]

    def forward_and_backward(batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros((), device=device)
        for i, (inputs, targets) in enumerate(batch):
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with strategy.micro_batch(last=i == batches.accumulation - 1):
                loss = strategy.model(inputs, targets)
                strategy.backward(loss)
            total += loss.detach() / batches.accumulation
        return total

    _warm_up(strategy, config, lambda: forward_and_backward(micro_batches(0)))
    train_time = 0.0
    validation = _validate(strategy, config, data, rows)
    _log(record, progress, {"step": 0, "tokens": 0, "train_time_ms": 0.0, **validation})
    with prefetch((micro_batches(step) for step in range(steps)), depth=2) as upcoming:
        for step in range(steps):
            started = time.perf_counter()
            batch = next(upcoming)
            fetched = time.perf_counter()
            multiplier = set_schedules(strategy, config, step, steps)
            total = forward_and_backward(batch)
            held = measure(strategy.held()) if step == min(1, steps - 1) else None
            norm = strategy.step()
            loss = mean_over_ranks(total)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step + 1}: lower the learning rates or clip.")
            ended = time.perf_counter()
            train_time += ended - started
            if held is not None:
                _write_ledger(strategy, held, record)

            done = step + 1
            last = done == steps
            validation = {}
            if last or (config.eval_every and done % config.eval_every == 0):
                validation = _validate(strategy, config, data, rows)
            _log(
                record,
                progress,
                {
                    "step": done,
                    "tokens": done * tokens_per_step,
                    "train_loss": loss,
                    **validation,
                    "lr": multiplier,
                    "grad_norm": norm,
                    "train_time_ms": train_time * 1e3,
                    "step_avg_ms": train_time * 1e3 / done,
                    "data_time_ms": (fetched - started) * 1e3,
                    "compute_time_ms": (ended - fetched) * 1e3,
                    "tokens_per_second": tokens_per_step / (ended - started),
                },
            )
            target = config.target_val_loss
            if target is not None and validation and validation["val_loss"] <= target:
                progress.say(f"reached the target validation loss {target} at step {done}")
                break


def cut_batches(config: Config, launch: Launch) -> Batches:
    """This rank's rows of every global batch, and the number of micro-batches.

    Raises ValueError where the batch does not divide, or where the accelerate config sets an accumulation or a clipping
    of its own that contradicts the run's.
    """
    total, world_size = config.data.global_batch, launch.world_size
    if total % world_size:
        raise ValueError(
            f"data.global_batch {total} does not divide over {world_size} ranks; "
            f"use {_nearest_multiple(total, world_size)}, or another number of processes."
        )
    rows = total // world_size
    micro_batch = min(config.data.micro_batch or rows, rows)
    if rows % micro_batch:
        raise ValueError(
            f"data.micro_batch {micro_batch} does not divide a rank's {rows} rows (data.global_batch {total} over "
            f"{world_size} ranks); use a divisor of {rows}."
        )
    accumulation = rows // micro_batch
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if asked.isdigit() and int(asked) not in (1, accumulation):
        raise ValueError(
            f"the accelerate config asks for gradient_accumulation_steps {asked}, but data.global_batch {total} over "
            f"{world_size} ranks in micro-batches of {micro_batch} makes {accumulation}; remove it, or set "
            f"data.micro_batch to {rows // int(asked) or 1}."
        )
    clip = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "")
    if clip not in ("", "auto", "none") and float(clip) != config.optimizer.clip:
        raise ValueError(
            f"the accelerate config asks for gradient_clipping {clip}, but optimizer.clip is {config.optimizer.clip}; "
            f"remove the one or pass --optimizer.clip {clip}."
        )
    return Batches(launch.rank * rows, rows, accumulation)


def number_of_steps(config: Config) -> int:
    """Steps until the step count or the token budget ends the run. Raises ValueError where that is none."""
    steps = config.steps
    per_step = config.data.global_batch * config.data.sequence_length
    if config.tokens is not None:
        steps = min(steps, config.tokens // per_step)
    if steps < 1:
        raise ValueError(
            f"steps {config.steps} and a token budget of {config.tokens} allow no step of {per_step} tokens."
        )
    return steps


def set_schedules(strategy: Strategy, config: Config, step: int, steps: int) -> float:
    """Put this step's learning rates and momentum into the optimizer; returns the multiplier."""
    multiplier = learning_rate_multiplier(config.schedule, step, steps)
    for group in strategy.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
        if "momentum" in group:
            group["momentum"] = muon_momentum(config.optimizer, step)
    return multiplier


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a scalar over all ranks. Collective."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def _warm_up(strategy: Strategy, config: Config, forward_and_backward: Callable[[], Tensor]) -> None:
    """Untimed steps that leave no trace: with learning rates of zero no weight moves, and the state is dropped after.

    They pay for what the first step of a process pays once: allocations, buckets, traces, compilation.
    """
    for _ in range(config.untimed_steps):
        for group in strategy.optimizer.param_groups:
            group["lr"] = 0.0
        forward_and_backward()
        strategy.step()
    strategy.optimizer.reset()


def _validate(strategy: Strategy, config: Config, data: Data, rows: int) -> dict[str, Any]:
    result: Validation = evaluate(strategy, data, rows)
    return {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}


def _log(record: Record | None, progress: Progress, metrics: dict[str, Any]) -> None:
    progress.step(metrics)
    if record:
        record.step(metrics)


def _write_ledger(strategy: Strategy, held: dict[str, int], record: Record | None) -> None:
    """Collect every rank's bytes on rank 0: gradients from just before the step, the rest from just after it."""
    ours = measure(strategy.held())
    ours["gradients"] = held["gradients"]
    place = strategy.optimizer.place
    ranks: list[Any] = [None] * place.world_size
    if place.world_size > 1:
        dist.all_gather_object(ranks, ours)
    else:
        ranks = [ours]
    if record:
        record.ledger([{"rank": rank, "measured": measured} for rank, measured in enumerate(ranks)])


def _headline(preset: str, config: Config, launch: Launch, batches: Batches, data: Data, parameters: int) -> str:
    return (
        f"{preset}: {parameters:,} parameters, {launch.strategy} on {launch.world_size} "
        f"{'rank' if launch.world_size == 1 else 'ranks'} ({'cpu' if launch.cpu else 'gpu'}, {launch.precision}), "
        f"{config.data.global_batch} rows of {config.data.sequence_length} tokens a step"
        f" ({batches.accumulation} micro-batch{'es' if batches.accumulation > 1 else ''} a rank), {data.name}: "
        f"{data.train_tokens:,} training tokens"
    )


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)


def _report(message: str) -> None:
    """Show a sentence on rank 0, and leave it for torchrun's closing summary, which otherwise hides it in a
    traceback.
    """
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": details}, file)


if __name__ == "__main__":
    main()
