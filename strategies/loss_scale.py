"""fp16's loss scale: a factor that lifts gradients into what float16 can hold, and the rule by which it moves.

float16 ends at 65504 and has nothing below 6e-8, where bf16 reaches as far as float32. So the loss is multiplied by a
scale before the backward pass, and the gradients are divided by it after (Micikevicius et al. 2018, arXiv 1710.03740).
Too large a scale overflows: a gradient is inf or NaN. Then the step is left out and the scale is halved; after many
steps without an overflow it is doubled.

Here stands torch.amp.GradScaler's rule. Its class itself does not fit: it looks for an overflow in what one rank holds,
and each rank would decide for itself. Ours asks the norm of the gradient, which is that of all ranks, so that all
decide alike. DeepSpeed has a scaler of its own (strategies/zero/loss_scale.py).

Plain Python, no torch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol


class LossScale(Protocol):
    """What the run and its checkpoints ask of a scale, whoever moves it. The same on all ranks."""

    @property
    def value(self) -> float:
        """What the next loss is multiplied by: a power of 2, unless DeepSpeed's fixed one says otherwise."""

    @property
    def can_fall(self) -> bool:
        """Whether another overflow would make it smaller, at once or soon."""

    def update(self, overflow: bool) -> None:
        """After a step."""

    def state(self) -> dict[str, Any]:
        """As a checkpoint keeps it, whatever the strategy: `scale`; `clean_steps`, those since the last overflow; and
        under DeepSpeed `hysteresis`, the overflows until the scale falls."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""


class DynamicLossScale:
    """torch.amp.GradScaler's rule and its numbers, on the host. See LossScale."""

    interval = 2000
    """Steps without an overflow until the scale is doubled."""
    smallest = 1.0
    """Torch has no such bound. An overflow of gradients that nothing lifts is not the scale's fault any more."""

    def __init__(self) -> None:
        self.value, self.clean_steps = 2.0**16, 0

    @property
    def can_fall(self) -> bool:
        return self.value > self.smallest

    def update(self, overflow: bool) -> None:
        if overflow:
            self.value, self.clean_steps = max(self.value / 2, self.smallest), 0
            return
        self.clean_steps += 1
        if self.clean_steps % self.interval == 0:
            self.value *= 2

    def state(self) -> dict[str, Any]:
        return {"scale": self.value, "clean_steps": self.clean_steps}

    def load(self, state: Mapping[str, Any]) -> None:
        self.value, self.clean_steps = max(float(state["scale"]), self.smallest), int(state["clean_steps"])


@contextmanager
def unmoved(scale: LossScale | None) -> Iterator[None]:
    """Whatever steps are made inside, the scale is afterwards what it was."""
    before = scale.state() if scale else {}
    yield
    if scale:
        scale.load(before)
