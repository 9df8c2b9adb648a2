"""What a step says of itself on the device, so that nobody has to wait for it there: whether it may count, and its
figures on their way to the host.

On a GPU the host only starts what the device does. Asking for a number ends that: it waits until all is done, and then
the device waits for the host. So a step's update is allowed or refused by tensors (`Allowance`), and its loss and norm
are copied to pinned memory (`Figures`), where the host reads them while the next step runs already.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

WINDOW = 32
"""Losses whose median a spike is measured by."""

ENOUGH = WINDOW // 4
"""Losses without which there is nothing to compare with."""


class Allowance:
    """Whether steps may count, as `speedrun.run.faults.Faults` decides it on the host, in the same arithmetic.

    After a step that did not count none is allowed until the host has looked at that one (`looked`).
    """

    def __init__(self, spike: float, device: torch.device):
        """spike: as in the configuration."""
        self.spike = spike
        self.losses = torch.full((WINDOW,), torch.inf, dtype=torch.float64, device=device)
        """Of the last steps that counted, in no order; inf where there was none."""
        self.places = torch.arange(WINDOW, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.stopped = torch.zeros((), dtype=torch.bool, device=device)

    def allows(self, loss: Tensor | None) -> Tensor:
        """Whether this step may count, a boolean scalar. loss: its mean over all ranks, where that is looked at."""
        if loss is None:
            return ~self.stopped
        loss = loss.double()
        fine = loss.isfinite() & ~self.stopped
        if self.spike:
            known = self.count.clamp(max=WINDOW)
            middle = torch.stack(((known - 1).clamp(min=0) // 2, known // 2)).clamp(max=WINDOW - 1)
            usual = self.losses.sort().values.gather(0, middle).mean()
            fine &= (known < ENOUGH) | (loss <= self.spike * usual)
        return fine

    def over(self, loss: Tensor, counts: Tensor) -> None:
        """After a step. loss: its mean over all ranks; counts: a boolean scalar."""
        if self.spike:
            here = (self.places == self.count % WINDOW) & counts
            self.losses = torch.where(here, loss.double(), self.losses)
            self.count += counts
        self.stopped |= ~counts

    def looked(self) -> None:
        """The host knows of the step that did not count."""
        self.stopped.zero_()


class Figures:
    """Numbers of the device, on their way to the host. To be read once, later."""

    def __init__(self, values: Tensor):
        """values: float32, of one dimension."""
        self.gpu = values.device.type == "cuda"
        self.values = values
        if self.gpu:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.there = torch.cuda.Event()
            self.there.record()

    def read(self) -> list[float]:
        """Waits until they are there."""
        if self.gpu:
            self.there.synchronize()
        return self.values.tolist()  # type: ignore[no-any-return]


def over_ranks(loss: Tensor, signals: Sequence[float] = ()) -> Tensor:
    """The means of a rank's loss and of its signals over all ranks, in one message, on its device. Collective."""
    values = loss.reshape(1)
    if signals:
        flags = torch.tensor([float(signal) for signal in signals])
        flags = flags.pin_memory() if loss.device.type == "cuda" else flags
        values = torch.cat((values, flags.to(loss.device, non_blocking=True)))
    else:
        values = values.clone()
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def mean_over_ranks(loss: Tensor, *signals: float) -> list[float]:
    """`over_ranks`, read at once. Collective."""
    return over_ranks(loss, signals).tolist()  # type: ignore[no-any-return]


@dataclass
class Taken:
    """A step that was made, and what is said of it once its figures are read. step: from 0; times in seconds."""

    step: int
    figures: Figures
    rate: float
    repeat: Callable[[], Tensor]
    started: float
    fetched: float
    ended: float = 0.0
    train_time: float = 0.0
    timed_steps: int = 0

    def times(self) -> dict[str, float | None]:
        """For metrics.jsonl."""
        return {
            "train_time_ms": self.train_time * 1e3,
            "timed_steps": self.timed_steps,
            "step_avg_ms": self.train_time * 1e3 / self.timed_steps if self.timed_steps else None,
            "data_time_ms": (self.fetched - self.started) * 1e3,
            "compute_time_ms": (self.ended - self.fetched) * 1e3,
        }
