"""single: one process, one device, no communication. What every other strategy is compared with.

Holds all of everything: 4 bytes of parameters, 4 of gradients and 8 of AdamW's moments (or 4 of Muon's momentum) per
parameter, in float32; under bf16 and fp16 the same, because autocast casts weights for the moment of their use only.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from strategies.base import Settings, TorchEngine, autocast, clip_and_step
from strategies.layout import everywhere
from strategies.optimizer import IntervalOptimizer, Recipe, Slice
from strategies.start import Initial, begin


class Single(TorchEngine):
    """See the module's docstring and strategies.base.Strategy."""

    name = "single"

    def prepare(
        self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int, initial: Initial | None = None
    ) -> None:
        self.model = begin(model, initial, self.settings.place.device)
        self.clip, self.accumulation = clip, accumulation
        self.optimizer = IntervalOptimizer(model, recipe)
        self.optimizer.bind(
            (Slice(name, tuple(p.shape), everywhere(tuple(p.shape), 1), p) for name, p in model.named_parameters()),
            self.settings.place,
        )

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with autocast(self.settings):
            yield

    def step(self, update: bool | Tensor = True) -> float | Tensor:
        gradients = self.held()["gradients"]
        self.unscale(gradients)
        if self.optimizer.observe:
            self.optimizer.observe("reduce", self.optimizer.gradients(self.optimizer.all_slices()))
        norm = nn.utils.get_total_norm(gradients)
        return clip_and_step(self.optimizer, gradients, norm, self.clip, update, self.loss_scale)

    def held(self) -> dict[str, list[Tensor]]:
        return {
            "parameters": list(self.model.parameters()),
            "gradients": [p.grad for p in self.model.parameters() if p.grad is not None],
            "optimizer states": [t for state in self.optimizer.state.values() for t in state.values()],
        }


def engine(name: str, settings: Settings) -> Single:
    """For strategies.catalogue."""
    return Single(settings)
