"""The mirror: the whole model on every rank, every gradient all-reduced by itself after the last backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.base import Settings, autocast
from strategies.ddp.engine import DDP
from strategies.layout import everywhere, on_rank
from strategies.optimizer import IntervalOptimizer, Recipe, Slice
from strategies.owners import Matrix, assign_owners


class Mirror(DDP):
    """As DDP without DistributedDataParallel: our own all-reduces, no buckets."""

    name = "mirror"

    def prepare(self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int) -> None:
        place = self.settings.place
        self.model = model.to(place.device)  # type: ignore[assignment]
        self.clip, self.accumulation = clip, accumulation
        self.parameters = dict(model.named_parameters())
        self.buckets = []
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        owned = [name for group in recipe if group.rule.whole_matrix for name in group.parameters]
        owners = assign_owners({name: shapes[name] for name in owned}, place.world_size)
        state = {
            name: on_rank(shape, owners[name], place.world_size)
            if name in owners
            else everywhere(shape, place.world_size)
            for name, shape in shapes.items()
        }
        self.matrices = [Matrix(name, shapes[name], state[name], owners[name]) for name in owned]
        self.optimizer = IntervalOptimizer(model, recipe)
        self.optimizer.bind(
            (Slice(name, shapes[name], state[name], p, replicated=True) for name, p in self.parameters.items()), place
        )

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
