"""Training in two parts on a rank of the pool: some steps and a checkpoint, then the rest from it."""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from shardrun.certify.equivalence import Case, micro_batches
from speedrun.data import open_data
from speedrun.model import GPT
from speedrun.optim.schedule import adamw_updates
from speedrun.stages import resolve_stages, stage_at
from strategies import catalogue
from strategies.base import Precision, Settings, Strategy
from strategies.checkpoint.format import read_index
from strategies.checkpoint.load import load
from strategies.checkpoint.save import Saver
from strategies.mesh import Place
from tests.strategies.small import make, prepared

CASE = Case(optimizer="muon", rows=12, steps=4)
RECORD = Case(optimizer="muon", rows=12, steps=8, record=True)
"""NorMuon (state per row), AdamW with a sum of gradients, and a second stage from the middle on."""
SAVED, STEPS = 2, CASE.steps


@dataclasses.dataclass
class Half:
    """Losses of the steps that were trained here, and everything whole at their end."""

    losses: list[float]
    weights: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]


def start(name: str, precision: Precision = "fp32", case: Case = CASE, seed: int = 0) -> Strategy:
    """The strategy over the ranks of this process's group (single: this process alone), with other weights than the
    case's for another seed."""
    case = dataclasses.replace(case, seed=case.seed + seed)
    if name != "single":
        return prepared(make(name, precision), case)
    return prepared(catalogue.engine(name, Settings(Place(0, 1, torch.device("cpu")), precision, {})), case)


def train(strategy: Strategy, first: int, last: int, case: Case = CASE) -> list[float]:
    """Steps [first, last) of the case; returns the global batch's losses."""
    config = case.config()
    stages = resolve_stages(config, case.steps)
    data = open_data(config.data, config.model.vocab_size, config.seed, stages)
    place = strategy.optimizer.place
    (model,) = (module for module in strategy.model.modules() if isinstance(module, GPT))
    losses = []
    for step in range(first, last):
        stage = stage_at(stages, step)
        accumulation = micro_batches(case, stage)
        if step in (first, stage.first):
            model.set_windows(stage.windows)
            strategy.set_accumulation(accumulation)
        for group in strategy.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * stage.lr
            group["update"] = adamw_updates(config.optimizer, step)
        rows = stage.global_batch // (place.ranks * accumulation)
        total = torch.zeros(())
        for i in range(place.global_rank * accumulation, (place.global_rank + 1) * accumulation):
            with strategy.micro_batch(last=i == (place.global_rank + 1) * accumulation - 1):
                loss = strategy.model(*data.batch(step, i * rows, (i + 1) * rows))
                strategy.backward(loss)
            total += loss.detach() / accumulation
        strategy.step()
        if place.ranks > 1:
            dist.all_reduce(total)
        losses.append(total.item() / place.ranks)
    return losses


def half(strategy: Strategy, losses: list[float]) -> Half | None:
    """What the ranks hold together, from rank 0 alone."""
    optimizer = strategy.optimizer
    result = Half(losses, optimizer.full_weights(), optimizer.full_state())
    return result if optimizer.place.global_rank == 0 else None


def train_and_save(
    name: str, folder: Path, precision: Precision = "fp32", last: int = SAVED, case: Case = CASE, saved: int = SAVED
) -> Half | None:
    """On a rank: train from the start, save after `saved` steps, go on to `last`."""
    strategy = start(name, precision, case)
    losses = train(strategy, 0, saved, case)
    saver = Saver(folder, name, precision, strategy.optimizer)
    saver.save(saved, {"note": "a test"})
    losses += train(strategy, saved, last, case)  # while it is written
    saver.wait()
    assert saver.failure is None, saver.failure
    return half(strategy, losses)


def load_and_train(
    name: str, checkpoint: Path, precision: Precision = "fp32", last: int = STEPS, case: Case = CASE
) -> Half | None:
    """On a rank: other weights, a step that must leave no trace, the checkpoint, then on to `last`."""
    strategy = start(name, precision, case, seed=1)
    train(strategy, 0, 1, case)
    index = read_index(checkpoint)
    load(checkpoint, index, strategy)
    return half(strategy, train(strategy, index.step, last, case))
