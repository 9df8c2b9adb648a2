"""A learner's class as a strategy of the trainer: what the loop asks for, said in the words of the class."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrun.own import OWN, Own, Portion
from strategies.base import Settings, TorchEngine, autocast, clip_gradients
from strategies.errors import UserError
from strategies.layout import EMPTY, Interval, Intervals
from strategies.mesh import Place
from strategies.optimizer import IntervalOptimizer, Recipe, Slice
from strategies.start import Initial, begin


class OwnStrategy(TorchEngine):
    """See strategies.base.Strategy. The trainer clips: it scales the gradients that `parts` gives, in place."""

    def __init__(self, own: Own, settings: Settings) -> None:
        super().__init__(settings)
        if settings.precision == "fp16":
            raise UserError(f"{own.path.name} knows nothing of a loss scale: train in fp32 or bf16, not in fp16.")
        self.name, self.file = own.name, own

    def prepare(
        self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int, initial: Initial | None = None
    ) -> None:
        if any(group.rule.matrix_buffers for group in recipe):
            raise UserError(f"{self.file.path.name} has no place for NorMuon's rows: set --optimizer.normuon false.")
        self.model = begin(model, initial, self.settings.place.device)
        self.clip, self.accumulation, self.last = clip, accumulation, True
        self.optimizer = OwnOptimizer(model, recipe)
        self.own = self.file.strategy(model, self.optimizer.param_groups)
        self.optimizer.begin(self.own, model, self.settings.place)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.last = last
        with autocast(self.settings):
            yield

    def backward(self, loss: Tensor) -> None:
        self.own.backward(loss / self.accumulation, self.last)
        if self.last:  # here, so that the books see what is there when all has come
            with torch.no_grad():
                self.own.wait()

    @torch.no_grad()
    def step(self, update: bool = True) -> float:
        self._observe("reduce")
        norm = torch.as_tensor(self.own.norm())
        value = float(norm)
        if update and torch.isfinite(norm):
            clip_gradients([part.gradient for part in self.own.parts() if part.gradient is not None], norm, self.clip)
            self._observe("clip")
            self.own.update()
        self.own.clear()
        return value

    def _observe(self, phase: str) -> None:
        if self.optimizer.observe:
            self.optimizer.observe(phase, self.optimizer.gradients(self.optimizer.all_slices()))

    def held(self) -> dict[str, list[Tensor]]:
        nothing: dict[str, list[Tensor]] = {"parameters": [], "gradients": [], "optimizer states": []}
        return {**nothing, **self.own.held()}


class OwnOptimizer(IntervalOptimizer):
    """What the trainer asks of an optimizer: rates, whole weights, zero state. The class itself makes the update."""

    def begin(self, own: Any, model: nn.Module, place: Place) -> None:
        """Ask who updates what. Raises UserError where an element is nobody's, or two ranks' that have other parts of
        it. Collective."""
        self.own, self.place, self.owners = own, place, {}
        self.names = {id(p): name for name, p in model.named_parameters()}
        mine = {
            self.names[id(part.parameter)]: (part.start, part.start + part.weight.numel())
            for part in own.parts()
            if part.weight.numel()
        }
        every: list[Any] = [mine] * place.world_size
        if place.world_size > 1:
            dist.all_gather_object(every, mine)
        for name, p in model.named_parameters():
            state = tuple(Interval(*rank[name]) if name in rank else EMPTY for rank in every)
            shape = tuple(self.shapes[name])
            if problem := uncovered(state, torch.Size(shape).numel()):
                raise UserError(f"{problem} of {name} {list(shape)}, says parts().")
            self.slices[id(p)] = [Slice(name, shape, state, p)]

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}

    def _parts(self) -> dict[str, Portion]:
        return {self.names[id(part.parameter)]: part for part in self.own.parts() if part.weight.numel()}

    def _weight(self, part: Portion | None) -> Tensor:
        return torch.empty(0, device=self.place.device) if part is None else part.weight.detach().view(-1)

    def _gradient(self, name: str, part: Portion | None) -> Tensor:
        if part is None or part.gradient is None:
            raise UserError(f"parts() gives no gradient of {name} after wait().")
        return part.gradient.detach().view(-1)

    def weight(self, piece: Slice) -> Tensor:
        return self._weight(self._parts().get(piece.name))

    def gradient(self, piece: Slice) -> Tensor:
        return self._gradient(piece.name, self._parts().get(piece.name))

    def gradients(self, pieces: Iterable[Slice]) -> dict[str, Tensor]:
        parts, nothing = self._parts(), torch.empty(0, device=self.place.device)
        return {
            piece.name: self._gradient(piece.name, parts.get(piece.name)).clone()
            if piece.state[self.place.rank].numel
            else nothing
            for piece in pieces
        }

    def full_weights(self) -> dict[str, Tensor]:
        parts = self._parts()
        return {piece.name: self.gather(piece, self._weight(parts.get(piece.name))) for piece in self.all_slices()}

    def reset(self) -> None:
        for tensor in self.own.held().get("optimizer states", ()):
            tensor.zero_()


def uncovered(state: Intervals, numel: int) -> str:
    """What is wrong with who updates which elements of a parameter, in words; nothing where all is well."""
    held: Sequence[Interval] = sorted({part for part in state if part.numel})
    end = 0
    for part in held:
        if part.start < end:
            return f"elements {part.start} to {min(end, part.stop)} are updated by two ranks with different parts"
        if part.start > end:
            return f"elements {end} to {part.start} are updated by no rank"
        end = part.stop
    if end < numel:
        return f"elements {end} to {numel} are updated by no rank"
    return f"there are elements up to {end} where there are {numel}" if end > numel else ""


def engine(name: str, settings: Settings) -> OwnStrategy:
    """For strategies.catalogue."""
    return OwnStrategy(OWN[name], settings)
