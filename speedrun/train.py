"""The entry point: train a preset under whatever strategy the accelerate config file asks for.

    accelerate launch --config_file accelerate_configs/cpu/zero2.yaml -m speedrun.train tiny --steps 100

It reads top to bottom: what was asked for, the data, the model, the strategy, then the loop. Nothing here asks which
strategy it is.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.checkpoints import Checkpoints, Resumed, find_checkpoint
from speedrun.compiling import allow_variants, compile_blocks
from speedrun.config import PRESETS, Config
from speedrun.data import Data, open_data, prefetch
from speedrun.ending import (
    NOT_SAVED,
    Interruptible,
    guarded,
    leave_for_torchrun,
    outcome,
    say_after_launcher,
    speaks_first,
    stop,
)
from speedrun.evaluate import Validation, evaluate
from speedrun.faults import Faults, first_nonfinite
from speedrun.kernels import choose
from speedrun.kernels.fp8 import in_words as fp8_in_words
from speedrun.ledger import Books, and_again, counted_step
from speedrun.model import GPT, parameter_shapes
from speedrun.model.attend import activate_flash
from speedrun.optim.policy import check as check_optimizer
from speedrun.optim.policy import parameter_groups
from speedrun.optim.precision import emulated_bf16, settle
from speedrun.optim.schedule import adamw_updates, forward_options, learning_rate_multiplier, muon_momentum
from speedrun.progress import Progress
from speedrun.record import Record
from speedrun.stages import (
    Batches,
    Section,
    cut_batches,
    number_of_steps,
    resolve,
    section_at,
    tokens_before,
    validation_rows,
)
from strategies import select
from strategies.base import Strategy
from strategies.select import Launch

HELP = """Train a preset under the strategy of an accelerate config file:

    accelerate launch --config_file accelerate_configs/cpu/zero2.yaml -m speedrun.train tiny --steps 100

The config file says how the run is spread over ranks and in which precision; the options say all else."""


def main() -> None:
    """Parse the command line and train."""
    preset, config = parse(sys.argv[1:])
    train(preset, config, select.launched())


def parse(arguments: list[str]) -> tuple[str, Config]:
    """`[PRESET] [--section.field value …]` → the preset's name and the whole configuration.

    Raises ValueError for an unknown preset; SystemExit after showing the help, or what is wrong with a field.
    """
    import tyro

    if not arguments or arguments[0].startswith("-"):
        arguments = ["tiny", *arguments]
    preset, *options = arguments
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}.")
    presets = "\n".join(f"    {name}: {about}" for name, (about, _) in PRESETS.items())

    def read(show: bool) -> Config:
        return tyro.cli(
            Config,
            default=PRESETS[preset][1],
            prog=f"speedrun.train {preset}",
            description=f"{HELP}\n\nPresets:\n{presets}\n\nThe defaults below are those of {preset}.",
            args=options,
            console_outputs=show,
        )

    try:
        return preset, read(show=False)
    except SystemExit as end:
        if end.code:
            wrong = "the command line is wrong; what is printed above says where."
            leave_for_torchrun(wrong)
            say_after_launcher(f"shardrun: error: {wrong}")
        if speaks_first("command line"):
            read(show=True)
        raise


@dataclasses.dataclass(frozen=True)
class Checked:
    """A run as it is going to be."""

    config: Config
    """With what was `auto` resolved, but for attention, which is chosen window by window."""
    sections: list[Section]
    batches: list[Batches]
    """Of each section."""
    data: Data
    shapes: dict[str, tuple[int, ...]]
    """Of the parameters, by name."""
    resumed: Resumed | None
    attention: set[str]
    """The attention functions that it takes."""
    resolved: list[str]
    """What `auto` has become, and why: lines to print."""


def check(config: Config, launch: Launch) -> Checked:
    """Look at everything that a user can get wrong, and resolve the configuration. Starts nothing, makes no weights.

    Raises ValueError or FileNotFoundError, in one sentence.
    """
    steps = number_of_steps(config)
    sections = resolve(config, steps)
    batches = [cut_batches(config, section, launch.world_size, launch.engine) for section in sections]
    data = open_data(config.data, config.model.vocab_size, config.seed, sections)
    longest = max(config.data.eval_sequence_length, *(section.sequence_length for section in sections))
    if longest > config.model.max_sequence_length:
        raise ValueError(
            f"rows of {longest} tokens (sequence_length, eval_sequence_length of data and stages) exceed "
            f"model.max_sequence_length {config.model.max_sequence_length}; raise the latter."
        )
    kernels, why = choose(config.model.kernels, "cpu" if launch.cpu else "cuda", launch.precision)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels=kernels))
    fp8 = fp8_in_words(kernels, launch.cpu) if config.model.fp8 else ""
    resolved = [f"kernels: {kernels} ({why})" + (f", head and MLP in FP8 {fp8}" if fp8 else "")]
    device = torch.device("cpu") if launch.cpu else torch.device("cuda", launch.local_rank)
    with torch.device("meta"):
        outline = GPT(config.model)
    attention, lines = attention_of_stages(outline, sections, device, launch.precision)
    resolved += lines
    shapes = parameter_shapes(config.model)
    check_optimizer(config.optimizer)
    resumed = find_checkpoint(config, shapes, data.content_hash)
    optimizer, why = settle(config.optimizer, resumed.orthogonalization_dtype if resumed else "auto", device)
    config = dataclasses.replace(config, optimizer=optimizer)
    if optimizer.name == "muon":
        resolved.append(f"orthogonalisation: {optimizer.orthogonalization_dtype} ({why})")
    if launch.precision == "bf16" and (costs := emulated_bf16(device)):
        resolved.append(costs)
    return Checked(config, sections, batches, data, shapes, resumed, attention, resolved)


def train(preset: str, config: Config, launch: Launch) -> None:
    """A whole run. Everything that a user can get wrong is checked before a process group starts."""
    run = check(config, launch)
    config, sections, batches, data, resumed = run.config, run.sections, run.batches, run.data, run.resumed
    torch.manual_seed(config.seed)  # nothing of ours draws from it, but its state is part of a checkpoint
    model = GPT(config.model, document_start=data.document_start)
    model.init_weights(config.seed)
    if config.compile:
        compile_blocks(model, config, launch)
    parameters = sum(math.prod(shape) for shape in run.shapes.values())

    record = None
    if launch.rank == 0:
        record = Record(config, launch, preset, data.content_hash, parameters, resumed.continues if resumed else None)
    progress = Progress(config.progress if launch.rank == 0 else "none", sections[-1].last)
    progress.say(_headline(preset, launch, sections, batches, data, parameters))
    for line in run.resolved:
        progress.say(line)
    try:
        strategy = select.start(launch, config.collective_timeout)
        optimizer = from_rank_0(config.optimizer)  # hosts may differ, and with them what `auto` has become
        recipe = parameter_groups(run.shapes, optimizer, config.model.kernels)
        strategy.prepare(model, recipe, clip=config.optimizer.clip, accumulation=batches[0].accumulation)
        select.bound_collectives(config.collective_timeout)
        if "varlen" in run.attention:
            capability = torch.cuda.get_device_capability(strategy.optimizer.place.device)
            progress.say(f"varlen attention: {activate_flash(capability)}")
        if config.compile or "flex" in run.attention:
            micro_batches = zip(batches, sections, strict=True)
            allow_variants(config.model, [(cut.micro_batch, section.sequence_length) for cut, section in micro_batches])
        about = {"preset": preset, "data_hash": data.content_hash, "document_start": data.document_start}
        folder = record.folder / "checkpoints" if record else None
        checkpoints = Checkpoints(config, launch, strategy, about, progress.say, folder)
        with Interruptible() as interruption, checkpoints:
            _loop(
                *(strategy, model, config, launch, data, sections, batches),
                *(record, progress, interruption, checkpoints, resumed),
            )
        if checkpoints.give_up():  # on the last one
            raise stop(NOT_SAVED)
        if record:
            record.finish("finished")
            progress.say(f"run: {record.folder}")
    except BaseException as error:
        if record:
            record.finish(outcome(error), error)
        raise
    finally:
        progress.close()


def _loop(
    strategy: Strategy,
    model: GPT,
    config: Config,
    launch: Launch,
    data: Data,
    sections: list[Section],
    batches: list[Batches],
    record: Record | None,
    progress: Progress,
    interruption: Interruptible,
    checkpoints: Checkpoints,
    resumed: Resumed | None,
) -> None:
    rows = validation_rows(config, sections, launch.world_size)
    steps = sections[-1].last
    device = strategy.optimizer.place.device

    def cut_at(step: int) -> Batches:
        return batches[sections.index(section_at(sections, step))]

    def micro_batches(step: int) -> list[tuple[Tensor, Tensor]]:
        return [data.batch(step, first, last) for first, last in cut_at(step).micro_batches(launch.rank)]

    def enter(section: Section) -> None:
        model.set_windows(section.windows)
        if len(sections) > 1:
            strategy.set_accumulation(cut_at(section.first).accumulation)

    def forward_and_backward(
        batch: list[tuple[Tensor, Tensor]], step: int, run: Callable[..., Tensor] = strategy.model
    ) -> Tensor:
        options = forward_options(config, step, steps)
        total = torch.zeros((), device=device)
        for i, (inputs, targets) in enumerate(batch):
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with strategy.micro_batch(last=i == len(batch) - 1):
                loss = run(inputs, targets, **options)
                strategy.backward(loss)
            total += loss.detach() / len(batch)
        return total

    faults = Faults(config, progress.say)
    start = resumed.step if resumed else 0
    counted_at = counted_step(steps, config.eval_every, start)
    cut, section = cut_at(counted_at), section_at(sections, counted_at)
    counted_steps = and_again(counted_at, section.last, config.eval_every, config.books_every)
    books = Books(config, launch, cut.accumulation, strategy, cut.micro_batch, section)
    books.note("after prepare")
    # A resumed run has at least one: engines settle in a process's first step, and the interrupted run's had.
    untimed = max(config.untimed_steps, 1) if start else config.untimed_steps
    for section in sections:
        enter(section)
        first_batch = micro_batches(section.first)
        _warm_up(strategy, untimed, lambda batch=first_batch: forward_and_backward(batch, 0))  # type: ignore[misc]
    enter(section_at(sections, min(start, steps - 1)))
    train_time, timed_steps = 0.0, 0
    if resumed and start:
        resumed.restore(strategy, progress.say)
        train_time, timed_steps = resumed.train_time, resumed.timed_steps
    else:
        validation = _validate(strategy, config, data, rows)
        _log(record, progress, {"step": 0, "tokens": 0, "train_time_ms": 0.0, "timed_steps": 0, **validation})
    with prefetch((micro_batches(step) for step in range(start, steps)), depth=2) as upcoming:
        for step in range(start, steps):
            started = time.perf_counter()
            batch = next(upcoming)
            fetched = time.perf_counter()
            interruption.step = step + 1
            section = section_at(sections, step)
            if step == section.first and step:
                enter(section)
            multiplier = set_schedules(strategy, config, step, steps, section)
            counted = step in counted_steps
            with books.step() if counted else nullcontext():
                watched = counted and step > 0  # the first step has no optimizer state before it
                total = forward_and_backward(batch, step, books.forward if watched else strategy.model)
                if watched:
                    books.note("after backward")
                if faults.early:
                    norm = strategy.step(update=not faults.refuses(mean_over_ranks(total, 0.0)[0]))
                else:
                    norm = strategy.step()
            asked = NOT_SAVED if checkpoints.give_up() else interruption.asked
            loss, interrupted = mean_over_ranks(total, float(asked))
            ended = time.perf_counter()
            if not counted:  # whose every operator is watched: no measure of training
                train_time += ended - started
                timed_steps += 1
            else:
                books.note("after step")
                ranks = books.gather()
                if record:
                    record.ledger(step + 1, ranks)

            done = step + 1
            # A step that is repeated to name a tensor is not timed either, nor are validation and checkpoints.
            repeat = partial(first_nonfinite, strategy, partial(forward_and_backward, batch, step))
            counts = faults.after_step(done, loss, norm, repeat)
            last = done == steps
            validation = {}
            if not interrupted and (last or (config.eval_every and done % config.eval_every == 0)):
                validation = _validate(strategy, config, data, rows)
            metrics = {
                "step": done,
                "tokens": tokens_before(sections, done),
                "train_loss": loss if math.isfinite(loss) else None,
                **validation,
                "lr": multiplier,
                "grad_norm": norm if counts else None,
                **({} if counts else {"skipped": True}),
                "train_time_ms": train_time * 1e3,
                "timed_steps": timed_steps,
                "step_avg_ms": train_time * 1e3 / timed_steps if timed_steps else None,
                "data_time_ms": (fetched - started) * 1e3,
                "compute_time_ms": (ended - fetched) * 1e3,
                "tokens_per_second": None if counted else section.tokens_per_step / (ended - started),
                **({"counted": True} if counted else {}),
            }
            _log(record, progress, metrics)
            target = config.target_val_loss
            reached = target is not None and bool(validation) and validation["val_loss"] <= target
            checkpoints.after_step(metrics, ending=bool(interrupted) or last or reached)
            if interrupted:
                raise stop(interrupted)
            if reached:
                progress.say(f"reached the target validation loss {target} at step {done}")
                break


def attention_of_stages(
    model: GPT, sections: list[Section], device: torch.device, precision: str
) -> tuple[set[str], list[str]]:
    """Which attention functions the run takes, and a line for each function of each stage that says for which windows,
    in positions, and why.

    Leaves the model with the last stage's windows. Raises ValueError where what was asked for cannot run.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    lines, kinds = [], set()
    for section in sections:
        model.set_windows(section.windows)
        windows: dict[tuple[str, str], list[int]] = {}
        for view, choice in model.attention_choices(section.sequence_length, device, dtype).items():
            windows.setdefault(choice, []).append(view.positions(section.sequence_length)[0])
        for (kind, why), sizes in windows.items():
            stage = f" in {section.name}" if len(sections) > 1 else ""
            limits = " and ".join(str(size) if size else "none" for size in dict.fromkeys(sizes))
            lines.append(f"attention{stage}{f', window {limits}' if any(sizes) else ''}: {kind} ({why})")
            kinds.add(kind)
    return kinds, lines


def set_schedules(strategy: Strategy, config: Config, step: int, steps: int, section: Section) -> float:
    """Put this step's learning rates and momentum into the optimizer; returns the multiplier."""
    multiplier = learning_rate_multiplier(config.schedule, step, steps) * section.lr
    for group in strategy.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
        if "momentum" in group:
            group["momentum"] = muon_momentum(config.optimizer, step, steps, section.momentum)
        else:
            group["update"] = adamw_updates(config.optimizer, step)
    return multiplier


def from_rank_0(value: Any) -> Any:
    """Rank 0's value on all ranks. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, 0)
    return said[0]


def mean_over_ranks(loss: Tensor, other: float) -> list[float]:
    """The means of a rank's loss and of another figure over all ranks, in one message. Collective."""
    values = torch.stack((loss, loss.new_tensor(other)))
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values.tolist()


def _warm_up(strategy: Strategy, untimed_steps: int, forward_and_backward: Callable[[], Tensor]) -> None:
    """Untimed steps that leave no trace: with learning rates of zero no weight moves, and the state is dropped after.

    They pay for what the first step of a process pays once: allocations, buckets, traces, compilation.
    """
    for _ in range(untimed_steps):
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


def _headline(
    preset: str, launch: Launch, sections: list[Section], batches: list[Batches], data: Data, parameters: int
) -> str:
    accumulation = batches[0].accumulation
    return (
        f"{preset}: {parameters:,} parameters, {launch.strategy} on {launch.world_size} "
        f"{'rank' if launch.world_size == 1 else 'ranks'} ({'cpu' if launch.cpu else 'gpu'}, {launch.precision}), "
        f"{sections[0].global_batch} rows of {sections[0].sequence_length} tokens a step"
        f" ({accumulation} micro-batch{'es' if accumulation > 1 else ''} a rank)"
        f"{f' in the first of {len(sections)} stages' if len(sections) > 1 else ''}, {data.name}: "
        f"{data.train_tokens:,} training tokens"
    )


if __name__ == "__main__":
    guarded(main)
