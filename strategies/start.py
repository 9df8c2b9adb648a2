"""How a model begins: built on the meta device, where it takes no memory, then given its initial values.

A strategy that keeps whole parameters makes them on its device and fills them (`begin`). One that shards cuts the
parameters while they are still on the meta device and fills what is left of each (`fill_held`): no rank ever holds the
model, only its shards and what it needs of one parameter at a time. This works because initial values are a function
of their place (`Initial`), not the next numbers of a generator that would have to draw the others first.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from strategies.layout import Interval
from strategies.optimizer import IntervalOptimizer


class Initial(Protocol):
    """The initial values of a model's parameters."""

    def __call__(self, name: str, start: int, stop: int, /) -> Tensor:
        """Elements [start, stop) of the flattened parameter: float32 [stop − start], on the CPU. The same ones whoever
        asks, in whatever parts."""


AT_ONCE = 2**22
"""Elements that are made in host memory at a time."""


def on_meta(model: nn.Module) -> bool:
    """Whether the model still has to be given memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def write_initial(out: Tensor, initial: Initial, name: str, here: Interval) -> None:
    """Put these elements of a parameter into `out`, flat, on any device and in any dtype."""
    with torch.no_grad():
        for first in range(here.start, here.stop, AT_ONCE):
            last = min(first + AT_ONCE, here.stop)
            out[first - here.start : last - here.start].copy_(initial(name, first, last))


def fill_held(optimizer: IntervalOptimizer, initial: Initial) -> None:
    """Give the weights that this rank updates their initial values: what it holds of each, no more."""
    for piece in optimizer.all_slices():
        write_initial(optimizer.weight(piece), initial, piece.name, piece.state[optimizer.place.rank])


def begin(
    model: nn.Module, initial: Initial | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model on its device, whole; its parameters get their initial values there, rounded to `dtype`, if it was on
    the meta device.

    Raises RuntimeError where a model on the meta device comes without initial values.
    """
    if not on_meta(model):
        return model.to(device)
    values = required(initial)
    for name, parameter in with_memory(model, dtype, device):
        write_initial(parameter.detach().view(-1), values, name, Interval(0, parameter.numel()))
    return model


def with_memory(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, nn.Parameter]]:
    """One parameter of a model on the meta device after the other, by name, as it has got memory, without values: in
    every module that uses it, so that what two modules share stays one parameter."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            places[parameter].append((module, own_name))
    for name, parameter in list(model.named_parameters()):
        memory = torch.empty(parameter.shape, dtype=dtype, device=device)
        new = nn.Parameter(memory, requires_grad=parameter.requires_grad)
        for module, own_name in places[parameter]:
            setattr(module, own_name, new)
        yield name, new


def required(initial: Initial | None) -> Initial:
    """Raises RuntimeError where there are none: a mistake of a program, not of a user."""
    if initial is None:
        raise RuntimeError("a model on the meta device has no values: pass prepare its initial ones (GPT.initial)")
    return initial
