"""The mirror: the whole model on every rank, every gradient all-reduced by itself after the last backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.base import Settings, autocast
from strategies.ddp.engine import DDP


class Mirror(DDP):
    """As DDP without DistributedDataParallel: our own all-reduces, no buckets."""

    name = "mirror"

    def _wrapped(self, model: nn.Module, owned: list[str]) -> nn.Module:
        return model

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with autocast(self.settings):
            yield

    @torch.no_grad()
    def step(self, update: bool = True) -> float:
        owned = {matrix.name for matrix in self.matrices}
        for name, parameter in self.parameters.items():
            if name not in owned and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.settings.place.world_size
        return super().step(update)

    def held(self) -> dict[str, list[Tensor]]:
        self.buckets = []
        return super().held()


def engine(name: str, settings: Settings) -> Mirror:
    """For strategies.catalogue."""
    return Mirror(settings)
