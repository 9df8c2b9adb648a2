"""What a strategy promises to the training loop, which contains no branch on it.

strategy.prepare(model, recipe, clip=1.0, accumulation=2)
for step in …:
    for i, (inputs, targets) in enumerate(micro_batches):
        with strategy.micro_batch(last=i == accumulation - 1):
            loss = strategy.model(inputs, targets)
            strategy.backward(loss)
    gradient_norm = strategy.step()
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.loss_scale import DynamicLossScale, LossScale
from strategies.mesh import Place
from strategies.optimizer import IntervalOptimizer, Recipe
from strategies.start import Initial

Precision = Literal["fp32", "bf16", "fp16"]

COMPUTE_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of matrix products."""


@dataclass(frozen=True)
class Settings:
    """What a strategy needs to know of the launch."""

    place: Place
    precision: Precision
    engine: dict[str, Any]
    """The engine's own settings, as the strategy's config.py reads them out of the config file."""
    config: str = "the accelerate config"
    """The file's name, for sentences."""


class Strategy(Protocol):
    """One way of spreading a model, its gradients and its optimizer over ranks."""

    name: str
    optimizer: IntervalOptimizer
    axes: Mapping[str, str]
    """Name of a process group → the axis of the mesh that it lies along; the groups of all ranks left out."""
    loss_scale: LossScale | None
    """In fp16, once prepared; None in any other precision."""

    @property
    def model(self) -> nn.Module:
        """Call it like the plain model, inside `micro_batch` or `evaluation`."""

    def prepare(
        self, model: nn.Module, recipe: Recipe, clip: float, accumulation: int, initial: Initial | None = None
    ) -> None:
        """Spread the model and bind its optimizer. Once. Its parameters are float32: equal on all ranks, or on the meta
        device, in which case they get their `initial` values, and a strategy that shards gives memory to no more than
        this rank's part. In bf16 and fp16 too the weights that the optimizer updates are these float32 values, to the
        bit.

        clip: the global L2 norm above which gradients are scaled down, 0 for never; accumulation: micro-batches per
        step.
        """

    def set_accumulation(self, accumulation: int) -> None:
        """From the next step on, so many micro-batches per step."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of one micro-batch: its precision, and no communication of gradients
        before the last one where the strategy allows it."""

    def backward(self, loss: Tensor) -> None:
        """Backward pass of a micro-batch's mean loss; divides by the number of micro-batches, once, and in fp16
        multiplies by the loss scale."""

    def step(self, update: bool | Tensor = True) -> float | Tensor:
        """Reduce what is not reduced yet, clip by the true global norm, update, clear gradients. Returns that norm,
        before clipping, of the gradient averaged over all ranks and micro-batches: a number, or a scalar on the device
        that nobody has waited for.

        Where update is False, or the norm is not finite, on all ranks alike, the step is left out: weights and
        optimizer state stay to the bit what they were. DeepSpeed then says that the norm is inf, whatever it was.
        update may be a boolean scalar on the device; torch's engines leave it there.
        In fp16 gradients are divided by the loss scale before anything is made of them, the norm too, and a norm that
        is not finite is an overflow, after which the scale falls. A step with update False leaves the scale alone.
        """

    def publish_weights(self) -> None:
        """After the optimizer's weights were written from outside: bring the copies that the model computes with up to
        date, where it has copies. Collective."""

    def evaluation(self) -> AbstractContextManager[None]:
        """Around forward passes without gradients. Every rank makes the same number of them."""

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors that this rank holds now, by category: live objects, found by looking, not by calculation."""

    def offloaded(self) -> dict[str, list[Tensor]]:
        """Those of `held` that belong in host memory, because the config file offloads them. Where the device is the
        CPU all of them lie there, and this alone tells the two apart."""


class TorchEngine:
    """What the strategies on torch's own engines have in common: the optimizer's weights are the model's own, and the
    loss is divided here. An engine averages over ranks, not over micro-batches.
    """

    axes: Mapping[str, str] = {}
    accumulation: int

    def __init__(self, settings: Settings):
        self.settings = settings
        self.loss_scale: LossScale | None = DynamicLossScale() if settings.precision == "fp16" else None

    def set_accumulation(self, accumulation: int) -> None:
        self.accumulation = accumulation

    def backward(self, loss: Tensor) -> None:
        loss = loss / self.accumulation
        (loss * self.loss_scale.value if self.loss_scale else loss).backward()

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide them by the loss scale, in place: exact, since that is a power of 2. An inf stays one."""
        if self.loss_scale and gradients:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.value)

    def publish_weights(self) -> None:
        pass  # there are no copies

    def offloaded(self) -> dict[str, list[Tensor]]:
        return {}

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        with torch.no_grad(), autocast(self.settings):
            yield


def autocast(settings: Settings) -> AbstractContextManager[None]:
    """16 bits as torch does it for float32 parameters: products in bf16 or fp16, weights and gradients in float32."""
    dtype = COMPUTE_DTYPES[settings.precision]
    return torch.autocast(settings.place.device.type, dtype, enabled=dtype != torch.float32)


def global_norm(spoken_for: list[Tensor], place: Place) -> Tensor:
    """The L2 norm of a gradient that lies on several ranks. Collective.

    spoken_for: the parts that this rank holds and speaks for (`strategies.layout.speaks`): of equal copies one counts.
    A norm over the local part alone would differ from rank to rank, and each would clip by its own factor.
    """
    square = nn.utils.get_total_norm(spoken_for) ** 2 if spoken_for else torch.zeros(())
    square = square.to(place.device)  # gradients may lie in host memory, which NCCL does not send
    if place.world_size > 1:
        dist.all_reduce(square, group=place.group)
    return square.sqrt()


def clip_gradients(gradients: list[Tensor], norm: Tensor, clip: float) -> None:
    """Scale gradients in place by clip / norm where norm exceeds clip (0: never); torch's and DeepSpeed's formula."""
    if clip and gradients:
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].device))


def clip_and_step(
    optimizer: IntervalOptimizer,
    gradients: list[Tensor],
    norm: Tensor,
    clip: float,
    update: bool | Tensor,
    loss_scale: LossScale | None,
) -> float | Tensor:
    """The end of a step, once gradients are reduced and unscaled: clip, update, clear. Returns the norm.

    norm: of all ranks, and so they all do the same. Where update is False or the norm is not finite, gradients are only
    cleared. That is decided on the device: the host goes on and starts the next step while this one still runs. Only
    fp16's loss scale, a number of the host, has to wait for it.
    """
    if loss_scale:
        value, update = norm.item(), bool(update)
        if update:
            loss_scale.update(overflow=not math.isfinite(value))
        if update and math.isfinite(value):
            clip_gradients(gradients, norm, clip)
            optimizer.step()
        optimizer.zero_grad()
        return value
    if update is not False:
        clip_gradients(gradients, norm, clip)
        counts = norm.isfinite() if update is True else norm.isfinite() & update
        optimizer.step_where(counts)
    optimizer.zero_grad()
    return norm
