"""What was asked for, looked at before anything starts: resolved to what the run is going to be, or one sentence why
not.
"""

import dataclasses
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from speedrun.books.forward_pass import ForwardPass
from speedrun.books.shapes import scenario_of
from speedrun.config import Config
from speedrun.data import Data, open_data
from speedrun.kernels import choose
from speedrun.kernels.fp8 import in_words as fp8_in_words
from speedrun.model import GPT, parameter_shapes
from speedrun.model.attend import activate_flash
from speedrun.model.compiling import allow_variants, without_spaces
from speedrun.optim.policy import check_optimizer
from speedrun.optim.precision import emulated_bf16, emulated_fp16, settle
from speedrun.ranges import check_ranges
from speedrun.run.checkpoints import Resumed, asked_to_resume
from speedrun.stages import Stage, check_lengths, number_of_steps, resolve_stages
from speedrun.wiring import check_fp8
from strategies import catalogue
from strategies.base import COMPUTE_DTYPES, Precision
from strategies.errors import UserError
from strategies.forecast.predict import predict_host
from strategies.ledger.hardware import GIB
from strategies.select import Launch


@dataclasses.dataclass(frozen=True)
class Checked:
    """A run as it is going to be."""

    config: Config
    """With what was `auto` resolved, but for attention, which is chosen window by window."""
    stages: list[Stage]
    data: Data
    shapes: dict[str, tuple[int, ...]]
    """Of the parameters, by name."""
    resumed: Resumed | None
    attention: set[str]
    """The attention functions that it takes."""
    resolved: list[str]
    """What `auto` has become, and why: lines to print."""

    @property
    def steps(self) -> int:
        """Of the whole run, if no target ends it earlier."""
        return self.stages[-1].last

    @property
    def parameters(self) -> int:
        """Elements of the model."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def check(config: Config, launch: Launch, said: Collection[str] = ()) -> Checked:
    """Look at everything that a user can get wrong, and resolve the configuration. Starts nothing, makes no weights.

    said: fields that the command line sets (`options_said`).

    Raises ValueError or FileNotFoundError, in one sentence.
    """
    check_fields(config)
    if config.compile and (why := catalogue.books(launch.strategy).refuses_compile):
        raise UserError(why)
    about = (launch.strategy, launch.world_size, launch.precision)
    if why := catalogue.books(launch.strategy).refuses(scenario_of(config, *about, engine=launch.engine)):
        raise UserError(f"{launch.config_file or 'the accelerate config'}: {why}")
    stages = resolve_stages(config, number_of_steps(config), launch.world_size)
    unreached = check_schedule(config, stages, said)
    data = open_data(config.data, config.model.vocab_size, config.seed, stages)
    check_lengths(config, stages)
    kernels, why = choose(config.model.kernels, "cpu" if launch.cpu else "cuda", launch.precision)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels=kernels))
    check_fp8(config.model, launch.precision, None if launch.cpu else torch.cuda.get_device_capability())
    fp8 = fp8_in_words(kernels, launch.cpu) if config.model.fp8 else ""
    resolved = [*unreached, *([data.note] if data.note else [])]
    resolved += [f"kernels: {kernels} ({why})" + (f", head and MLP in FP8 {fp8}" if fp8 else "")]
    device = torch.device("cpu") if launch.cpu else torch.device("cuda", launch.local_rank)
    with torch.device("meta"):
        outline = GPT(config.model)
    attention, lines = attention_of_stages(outline, stages, device, launch.precision)
    resolved += lines
    if launch.cpu and (config.compile or "flex" in attention):
        without_spaces()
    shapes = parameter_shapes(config.model)
    check_memory(config, stages, launch)
    check_optimizer(config.optimizer, max(stage.lr for stage in stages))
    resumed = asked_to_resume(config, shapes, data.content_hash, data.older_hash)
    optimizer, why = settle(config.optimizer, resumed.orthogonalization_dtype if resumed else "auto", device)
    config = dataclasses.replace(config, optimizer=optimizer)
    if optimizer.name == "muon":
        resolved.append(f"orthogonalisation: {optimizer.orthogonalization_dtype} ({why})")
    emulated = {"fp32": "", "bf16": emulated_bf16(device), "fp16": emulated_fp16(device)}
    if costs := emulated[launch.precision]:
        resolved.append(costs)
    return Checked(config, stages, data, shapes, resumed, attention, resolved)


def check_fields(config: Config) -> None:
    """What can be said of the fields alone, before the run's folder is made. Raises ValueError."""
    check_ranges(config)
    check_out(config)


def check_out(config: Config) -> None:
    """Raises ValueError where the run's folder cannot be made."""
    path = Path(config.out) / config.name
    try:
        there = next(folder for folder in (path, *path.parents) if folder.exists())
    except OSError as error:  # a part of the path is too long, or behind a folder that may not be looked into
        raise UserError(f"the run's folder would be {path} ({error.strerror}): give another --out.") from error
    if not there.is_dir():
        raise UserError(f"{there} is a file, and the run's folder would be {path}: give another --out or --name.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"nothing can be written into {there}, where the run's folder would be: give another --out.")


def check_schedule(config: Config, stages: Sequence[Stage], said: Collection[str]) -> list[str]:
    """Lines to print on what the run is too short for. A preset's own value is one of them; what the command line says
    (said) raises ValueError."""
    steps, shortest = stages[-1].last, min(stage.sequence_length for stage in stages)
    if len(config.schedule.future_weights) >= shortest:
        raise UserError(
            f"schedule.future_weights has {len(config.schedule.future_weights)} weights, but rows of {shortest} tokens "
            "have no tokens so far ahead: give fewer."
        )
    too_long = {}
    if (warmup := config.schedule.warmup) > steps:
        too_long["schedule.warmup"] = f"schedule.warmup is {warmup}, and no rate reaches its peak"
    if (every := config.optimizer.adamw_every) > steps:
        too_long["optimizer.adamw_every"] = f"optimizer.adamw_every is {every}, and AdamW never updates"
    for name, sentence in too_long.items():
        if name in said:
            raise UserError(f"{sentence}: the run has {steps} steps, so give {steps} at most, or more steps.")
    return [f"warning: {sentence}: the run has {steps} steps" for sentence in too_long.values()]


def is_done(checked: Checked, launch: Launch) -> bool:
    """Whether nothing is left to train of a run that was to go on; says so."""
    done = checked.resumed.done if checked.resumed else ""
    if done and launch.rank == 0:
        print(done, flush=True)
    return bool(done)


def check_memory(config: Config, stages: Sequence[Stage], launch: Launch) -> None:
    """Raises ValueError where the run cannot be held: on a CPU each rank's peak, as the books predict it, is in the
    machine's own memory; on a GPU what is offloaded from there. A model is not made in host memory first. Less than a
    run takes in truth, so that none is refused that would fit."""
    needed, ranks = 0, launch.local_world_size
    if launch.cpu:  # a validation's attention mask: a byte for every pair of positions
        needed = (config.data.eval_sequence_length or config.data.sequence_length) ** 2
    for stage in stages:
        books = scenario_of(config, launch.strategy, launch.world_size, launch.precision, engine=launch.engine)
        if not launch.cpu:
            needed = max(needed, *(sum(held.values()) for rank in predict_host(books) for held in rank.values()), 0)
        else:
            rows, future = stage.batches.micro_batch, len(config.schedule.future_weights)
            passes = ForwardPass(config.model, rows, stage.sequence_length, future)
            needed = max(needed, *(sum(held.values()) for held in passes.predict_peak(books)))
    if needed * ranks > (there := machine_memory()):
        each = f" ({ranks} ranks of {needed / GIB:,.1f} GiB)" if ranks > 1 else ""
        raise UserError(
            f"the run would hold {needed * ranks / GIB:,.1f} GiB{each}, and this machine has {there / GIB:,.1f} GiB: "
            "make the model, the micro-batch or the rows smaller; shardrun plan says what takes how much."
        )


def machine_memory() -> int:
    """Bytes that the processes of this machine, or of this container, can hold together."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (meminfo := Path("/proc/meminfo")).exists():
        swap = next((line for line in meminfo.read_text().splitlines() if line.startswith("SwapTotal:")), "0 0 kB")
        memory += int(swap.split()[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container; the word max where there is none
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return memory


def attention_of_stages(
    model: GPT, stages: list[Stage], device: torch.device, precision: Precision
) -> tuple[set[str], list[str]]:
    """Which attention functions the run takes, and a line for each function of each stage that says for which windows,
    in positions, and why.

    Leaves the model with the last stage's windows. Raises ValueError where what was asked for cannot run.
    """
    lines, kinds = [], set()
    for stage in stages:
        model.set_windows(stage.windows)
        windows: dict[tuple[str, str], list[int]] = {}
        for view, choice in model.attention_choices(stage.sequence_length, device, COMPUTE_DTYPES[precision]).items():
            windows.setdefault(choice, []).append(view.positions(stage.sequence_length)[0])
        for (kind, why), sizes in windows.items():
            where = f" in {stage.name}" if len(stages) > 1 else ""
            limits = " and ".join(str(size) if size else "none" for size in dict.fromkeys(sizes))
            lines.append(f"attention{where}{f', window {limits}' if any(sizes) else ''}: {kind} ({why})")
            kinds.add(kind)
    return kinds, lines


def switch_on(run: Checked, device: torch.device) -> list[str]:
    """Set what torch keeps for the whole process: FlashAttention's version, the limit of compiled variants. Returns
    lines to print.
    """
    lines = []
    if "varlen" in run.attention:
        lines.append(f"varlen attention: {activate_flash(torch.cuda.get_device_capability(device))}")
    if run.config.compile or "flex" in run.attention:
        shapes = [(stage.batches.micro_batch, stage.sequence_length) for stage in run.stages]
        allow_variants(run.config.model, shapes)
    return lines
