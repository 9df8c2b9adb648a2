"""What a strategy promises to the training loop, which contains no branch on it.

strategy.prepare(model, recipe, clip=1.0, accumulation=2)
for step in …:
    for i, (inputs, targets) in enumerate(micro_batches):
        with strategy.micro_batch(last=i == accumulation - 1):
            loss = strategy.model(inputs, targets)
            strategy.backward(loss)
    gradient_norm = strategy.step()
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.matrices import Place
from strategies.optimizer import IntervalOptimizer, Recipe

Precision = Literal["fp32", "bf16"]

CATEGORIES = ("parameters", "master parameters", "gradients", "optimizer states", "communication buffers")
"""What a rank's tensors are held for (activations are counted elsewhere: no strategy owns them)."""


@dataclass(frozen=True)
class Settings:
    """What a strategy needs to know of the launch."""

    place: Place
    precision: Precision
    engine: dict[str, Any]
    """The engine's own settings, as accelerate's plugins parsed them from the config file."""


class Strategy(Protocol):
    """One way of spreading a model, its gradients and its optimizer over ranks."""

    name: str
    optimizer: IntervalOptimizer

    @property
    def model(self) -> nn.Module:
        """Call it like the plain model, inside `micro_batch` or `evaluation`."""

    def prepare(self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int) -> None:
        """Spread the model (equal on all ranks, in float32) and bind its optimizer. Once. In bf16 too the weights that
        the optimizer updates are these float32 values, to the bit.

        clip: the global L2 norm above which gradients are scaled down, 0 for never; accumulation: micro-batches per
        step.
        """

    def set_accumulation(self, accumulation: int) -> None:
        """From the next step on, so many micro-batches per step."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of one micro-batch: its precision, and no communication of gradients
        before the last one where the strategy allows it."""

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a micro-batch's mean loss; divides by the number of micro-batches, once."""

    def step(self, update: bool = True) -> float:
        """Reduce what is not reduced yet, clip by the true global norm, update, clear gradients. Returns that norm,
        before clipping, of the gradient averaged over all ranks and micro-batches.

        Where update is False, or the norm is not finite, on all ranks alike, the step is left out: weights and
        optimizer state stay to the bit what they were. DeepSpeed then says that the norm is inf, whatever it was.
        """

    def publish_weights(self) -> None:
        """After the optimizer's weights were written from outside: bring the copies that the model computes with up to
        date, where it has copies. Collective."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Around forward passes without gradients. Every rank makes the same number of them."""

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors that this rank holds now, by category: live objects, found by looking, not by calculation."""


def autocast(settings: Settings) -> AbstractContextManager[None]:
    """bf16 as torch does it for float32 parameters: matrix products in bf16, weights and gradients in float32."""
    return torch.autocast(settings.place.device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def global_norm(sharded: list[Tensor], replicated: list[Tensor], place: Place) -> Tensor:
    """The L2 norm of a gradient of which this rank holds `sharded` alone and `replicated` like all others. Collective.

    What one rank holds is summed over the ranks, what every rank holds counts once. A norm over the local part alone
    would differ from rank to rank, and each would clip by its own factor.
    """
    square = nn.utils.get_total_norm(sharded) ** 2 if sharded else torch.zeros((), device=place.device)
    if place.world_size > 1:
        dist.all_reduce(square)
    return (square + nn.utils.get_total_norm(replicated) ** 2).sqrt() if replicated else square.sqrt()


def clip_gradients(gradients: list[Tensor], norm: Tensor, clip: float) -> None:
    """Scale gradients in place by clip / norm where norm exceeds clip (0: never); torch's and DeepSpeed's formula."""
    if clip and gradients:
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
