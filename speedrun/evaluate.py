"""Validation: the mean cross-entropy over a fixed set of targets, the same on every strategy and world size."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.data import Data
from strategies.base import Strategy


@dataclass(frozen=True)
class Validation:
    """loss: mean nats per target token; bits_per_byte: of the text behind them, None where the tokenizer is unknown."""

    loss: float
    bits_per_byte: float | None


def evaluate(strategy: Strategy, data: Data, rows: int) -> Validation:
    """Validate, `rows` rows per rank and forward pass. Collective.

    Rows are dealt to the ranks in turn. Where they do not divide, the last ranks get a row without targets: every rank
    must make the same number of forward passes, because under FSDP and ZeRO-3 a forward pass communicates.
    """
    place = strategy.optimizer.place
    total = torch.zeros(2, dtype=torch.float64, device=place.device)  # nats, targets
    with strategy.evaluation():
        for first in range(0, data.validation_rows, rows * place.ranks):
            start = first + rows * place.global_rank
            inputs, targets = _rows(data, start, start + rows)
            nats = strategy.model(inputs.to(place.device), targets.to(place.device), "sum")
            total[0] += nats
            total[1] += (targets != -1).sum()
    if place.ranks > 1:
        dist.all_reduce(total)
    nats, targets = total.tolist()
    text_bytes = data.target_bytes()
    return Validation(nats / targets, nats / math.log(2) / text_bytes if text_bytes else None)


def _rows(data: Data, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Validation rows [first, last), of which those past the end have no targets."""
    end = min(last, data.validation_rows)
    if first >= end:
        inputs, targets = data.validation(0, 1)
        return inputs, torch.full_like(targets, -1)
    return data.validation(first, end)
