"""What the demos share: a small GPT that trains on the built-in text, under whatever strategy accelerate launched.

A demo reads like a training script, and all that is not its subject is here.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardrun.colours import SERIES
from shardrun.output import save_picture
from speedrun.books.parts import part_of
from speedrun.books.shapes import scenario_of
from speedrun.config import Config, DataConfig, ModelConfig, OptimizerConfig
from speedrun.data import Data, open_data
from speedrun.model import GPT
from speedrun.optim.policy import parameter_groups
from speedrun.stages import Batches, cut_rows
from strategies import select
from strategies.base import Strategy
from strategies.errors import UserError
from strategies.ledger.activations import ActivationBook, measure_activations
from strategies.ledger.memory import measure
from strategies.ledger.terms import Scenario
from strategies.select import Launch

CONFIG = Config(
    model=ModelConfig(layers=2, heads=2, width=128, positions="rope", kernels="torch"),
    # A large eps: AdamW divides by a gradient's size, and with a small one the rounding errors of gradients that are
    # next to zero would grow into whole steps, in one process already.
    optimizer=OptimizerConfig(name="adamw", clip=1.0, eps=1e-5),
    data=DataConfig(sequence_length=64, global_batch=16, eval_tokens=64),
)
"""About 0.46M parameters, AdamW everywhere, 1024 tokens a step: some 50 ms on one CPU core."""


def steps(wanted: int) -> int:
    """How many steps a demo trains: as many as it wants, or at most SHARDRUN_LESSON_STEPS where tests have set that.

    Raises ValueError for a value that is no number of steps.
    """
    most = os.environ.get("SHARDRUN_LESSON_STEPS", "")
    if most and not (most.isdecimal() and int(most)):
        raise UserError(f"SHARDRUN_LESSON_STEPS is {most!r}; set it to a number of steps from 1 up, or not at all.")
    return min(wanted, int(most)) if most else wanted


def eval_tokens(wanted: int) -> int:
    """How many tokens a demo validates on: a multiple of 1024; at most 1024 for each step that tests have set."""
    return 1024 * steps(wanted // 1024)


def open_text(config: Config = CONFIG) -> Data:
    """The documentation inside Python, as bytes: no download."""
    return open_data(config.data, config.model.vocab_size, config.seed)


def build(config: Config = CONFIG) -> GPT:
    """The model, with the same weights on every rank."""
    model = GPT(config.model)
    model.init_weights(config.seed)
    return model


def prepare(strategy: Strategy, config: Config = CONFIG, accumulation: int = 1) -> None:
    """Give the strategy a fresh model and its optimizer."""
    model = build(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    recipe = parameter_groups(shapes, config.optimizer)
    strategy.prepare(model, recipe, clip=config.optimizer.clip, accumulation=accumulation)


def doing(what: str) -> None:
    """Say on rank 0 what comes next, so that nobody waits before an empty screen."""
    if os.environ.get("RANK", "0") == "0":
        print(f"… {what}", flush=True)


def launched() -> tuple[Launch, Strategy]:
    """What `accelerate launch` (or plain python: one process) asked for, and its strategy, not yet prepared."""
    launch = select.launched()
    return launch, select.start(launch)


def cut(data: Data, world_size: int, accumulation: int = 1) -> Batches:
    """How a step's global batch is cut: into exactly so many micro-batches a rank.

    Raises ValueError where it does not divide.
    """
    batches = cut_rows(data.global_batch, world_size, data.global_batch // (world_size * accumulation))
    if batches.accumulation != accumulation:
        raise UserError(
            f"{data.global_batch} rows do not divide into {world_size} ranks times {accumulation} micro-batches; "
            "use 1, 2, 4 or 8 processes."
        )
    return batches


def rows_of(launch: Launch, data: Data, step: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of a step's global batch: tokens and targets, int64 [rows, length], on the CPU.

    Raises ValueError where the batch does not divide over the ranks.
    """
    [(first, last)] = cut(data, launch.world_size).micro_batches(launch.rank)
    return data.batch(step, first, last)


def run_steps(strategy: Strategy, launch: Launch, data: Data, steps: int) -> list[float]:
    """Train a prepared strategy, one micro-batch a step. Returns this rank's loss of every step."""
    losses = []
    for step in range(steps):
        inputs, targets = (tensor.to(strategy.optimizer.place.device) for tensor in rows_of(launch, data, step))
        with strategy.micro_batch(last=True):
            loss = strategy.model(inputs, targets)
            strategy.backward(loss)
        strategy.step()
        losses.append(loss.item())
    return losses


def launched_scenario(launch: Launch, config: Config = CONFIG, accumulation: int = 1) -> Scenario:
    """What the predictions need to know: shapes, groups, world size, precision, settings. No live tensor."""
    return scenario_of(config, launch.strategy, launch.world_size, launch.precision, accumulation, launch.engine)


def held(strategy: Strategy) -> dict[str, int]:
    """Bytes that this rank holds now, by category, counted from its live tensors."""
    return measure(strategy.held())


def watched_forward(strategy: Strategy, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ActivationBook]:
    """The loss of a micro-batch, and what autograd keeps of its forward pass, measured."""
    losses: list[Tensor] = []
    book = measure_activations(strategy.model, lambda: losses.append(strategy.model(inputs, targets)), part_of)
    return losses[0], book


def with_model(config: Config, **changes: Any) -> Config:
    """The configuration with other fields of its model."""
    return replace(config, model=replace(config.model, **changes))


def headline(launch: Launch, what: str) -> str:
    ranks = "1 rank" if launch.world_size == 1 else f"{launch.world_size} ranks"
    device = "CPU" if launch.cpu else torch.cuda.get_device_name()
    return f"{what}: {launch.strategy} on {ranks}, {launch.precision}, {device}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    lines = [headings, ["─" * width for width in widths], *rows]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in lines
    )


def save_figure(name: str, draw: Callable[[Any], None], size: tuple[float, float] = (10, 4)) -> str:
    """Draw on a new matplotlib figure and save it as runs/NAME.png; returns what to say about it."""
    try:
        import matplotlib
    except ImportError:
        return "No picture: matplotlib is not installed (pip install 'shardrun[plots]')."
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = Path("runs") / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    with plt.rc_context({"axes.prop_cycle": plt.cycler(color=SERIES)}):
        figure = plt.figure(figsize=size, layout="constrained")
        draw(figure)
        save_picture(figure, path, dpi=120)
    plt.close(figure)
    return f"Picture: {path}"
