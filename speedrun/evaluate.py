"""Validation: the mean cross-entropy over a fixed set of targets, the same on every strategy and world size."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.data import Data
from strategies.base import Strategy
from strategies.mesh import Place


@dataclass(frozen=True)
class Validation:
    """loss: mean nats per target token; bits_per_byte: of the text behind them, None where the tokenizer is unknown."""

    loss: float
    bits_per_byte: float | None


class BrokenOff(Exception):
    """A rank was asked to end while it validated: raised on all ranks, after the same forward pass."""


def evaluate(strategy: Strategy, data: Data, rows: int, stop: Callable[[], bool] = bool) -> Validation:
    """Validate, `rows` rows per rank and forward pass. Collective.

    stop: whether this rank wants to break off; asked before every forward pass. Raises BrokenOff where any did.

    Rows are dealt to the ranks in turn. Where they do not divide, the last ranks get a row without targets: every rank
    must make the same number of forward passes, because under FSDP and ZeRO-3 a forward pass communicates.
    """
    place = strategy.optimizer.place
    total = torch.zeros(2, dtype=torch.float64, device=place.device)  # nats, targets
    wishes, broken_off = Wishes(place), False
    with strategy.evaluation():
        for first in range(0, data.validation_rows, rows * place.ranks):
            if broken_off := wishes.any(stop()):
                break
            start = first + rows * place.global_rank
            inputs, targets = _rows(data, start, start + rows)
            nats = strategy.model(inputs.to(place.device), targets.to(place.device), "sum")
            total[0] += nats
            total[1] += (targets != -1).sum()
    wishes.any(False)  # the last pass's
    if broken_off:
        raise BrokenOff
    if place.ranks > 1:
        dist.all_reduce(total)
    nats, targets = total.tolist()
    text_bytes = data.target_bytes()
    return Validation(nats / targets, nats / math.log(2) / text_bytes if text_bytes else None)


class Wishes:
    """Whether any rank wants to break off, told before every forward pass and known before the next one.

    One pass late, so that nobody waits: the message travels while the pass before it is computed, and on a GPU the
    answer is copied to the host in the order of the stream, behind no later pass.
    """

    def __init__(self, place: Place):
        self.place = place
        self.on_gpu = place.device.type == "cuda"
        self._under_way: tuple[Tensor, Any] | None = None

    def any(self, mine: bool) -> bool:
        """Tell the others this rank's wish; returns whether any rank had one before the last pass. Collective."""
        if self.place.ranks == 1:
            return mine
        before, self._under_way = self._under_way, self._send(mine)
        if before is None:
            return False
        answer, done = before
        done.synchronize() if self.on_gpu else done.wait()
        return bool(answer.item())

    def _send(self, mine: bool) -> tuple[Tensor, Any]:
        """The answer, and what to wait for before it is read."""
        wish = torch.full((1,), float(mine), device=self.place.device)
        work = dist.all_reduce(wish, async_op=True)
        if not self.on_gpu:
            return wish, work
        work.wait()  # the stream does, not the host
        answer = torch.empty(1, pin_memory=True).copy_(wish, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return answer, copied


def _rows(data: Data, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Validation rows [first, last), of which those past the end have no targets."""
    end = min(last, data.validation_rows)
    if first >= end:
        inputs, targets = data.validation(0, 1)
        return inputs, torch.full_like(targets, -1)
    return data.validation(first, end)
