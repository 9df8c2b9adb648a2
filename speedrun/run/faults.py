"""A step whose numbers are wrong: whether it is one, where that began, and what to do about it.

The loss and the gradient's norm are means and sums over all ranks, so that all ranks see the same and decide alike. A
strategy changes no weight where the norm is not finite (`Strategy.step`), so the step can be repeated on the same
batch, watched: the first tensor that is not finite is where the trouble began.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.config import Config
from speedrun.model.compiling import uncompiled
from strategies.base import Strategy
from strategies.loss_scale import LossScale

WINDOW = 32
"""Losses whose median a spike is measured by."""

PATIENCE = 4
"""Steps in a row that may overflow with an fp16 loss scale that cannot fall any more. One may be of its batch alone."""

PHASES = ("weights", "forward", "loss", "backward", "reduce")
"""In the order of a step: weights that the last update left, activations, the loss, gradients of activations, and
gradients of parameters, averaged over micro-batches and ranks."""


def loss_comes_first(config: Config) -> bool:
    """Whether the loss of all ranks must be known before the update: one that spikes has a finite gradient, which only
    the loss betrays. Otherwise the norm is enough, which the strategy looks at by itself.
    """
    return config.spike > 0 or config.on_nonfinite == "skip"


class Faults:
    """The policy of a run: `on_nonfinite` and `spike` of its configuration."""

    def __init__(self, config: Config, say: Callable[[str], None]):
        self.policy, self.spike, self.say = config.on_nonfinite, config.spike, say
        self.early = loss_comes_first(config)
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.stuck = 0
        """Overflows in a row with a loss scale that could not fall."""

    def refuses(self, loss: float) -> bool:
        """Whether a step with this loss, the mean over all ranks, must change nothing."""
        return not math.isfinite(loss) or self._spikes(loss)

    def _spikes(self, loss: float) -> bool:
        enough = len(self.losses) >= WINDOW // 4
        return self.spike > 0 and enough and loss > self.spike * median(self.losses)

    def after_step(
        self, step: int, loss: float, norm: float, repeat: Callable[[], str], scale: LossScale | None = None
    ) -> bool:
        """Whether the step counts. step: from 1; repeat: does it again, watched, and says where the trouble began;
        scale: fp16's, as the step has left it.

        In fp16 a norm that is not finite, of a loss that is, is an overflow. The step is left out and the scale falls,
        which is no fault; `PATIENCE` such steps with a scale that cannot fall are one.

        Raises FloatingPointError, with the same sentence on all ranks, where the policy is to stop. Collective where
        the step does not count.
        """
        if math.isfinite(norm) and not self.refuses(loss):
            self.losses.append(loss)
            self.stuck = 0
            return True
        overflow = scale is not None and not self.refuses(loss)
        self.stuck = self.stuck + 1 if scale and overflow and not scale.can_fall else 0
        if scale and overflow and self.stuck < PATIENCE:
            self.say(f"fp16 overflow at step {step}: the step was left out; the loss scale is {scale.value:,.10g} now")
            return False
        if math.isfinite(loss) and self._spikes(loss):
            usual = median(self.losses)
            what = f"the loss is {loss:.4g} at step {step}, above spike = {self.spike:g} times the usual {usual:.4g}"
        else:
            what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
            if scale and overflow:
                row = f"{self.stuck} steps in a row overflowed in fp16"
                what = f"{row} with a loss scale, {scale.value:,.10g}, that cannot fall further, and {what}"
            what = f"{what} at step {step}; {repeat()}"
        if self.policy == "stop":
            raise FloatingPointError(f"{what}: lower the learning rates or clip, or pass --on-nonfinite skip.")
        self.say(f"warning: {what}; the step was left out")
        return False


def first_nonfinite(strategy: Strategy, forward_and_backward: Callable[[], Tensor]) -> str:
    """Repeat a step without its update; returns in words on which ranks what was the first tensor not to be finite.

    forward_and_backward: on the same batch, returns the loss. Collective: all ranks call it together.
    """
    found: dict[str, str] = {}

    def see(phase: str, what: str, tensor: Tensor) -> None:
        if phase not in found and not torch.isfinite(tensor).all():
            found[phase] = what

    def see_parameters(phase: str, tensors: dict[str, Tensor]) -> None:
        if phase == "reduce":
            for name, gradient in tensors.items():
                see(phase, f"the reduced gradient of {name}", gradient)

    optimizer = strategy.optimizer
    for piece in optimizer.all_slices():
        see("weights", f"the weight {piece.name}, since an update before", optimizer.weight(piece))
    before, optimizer.observe = optimizer.observe, see_parameters
    try:
        with uncompiled(strategy.model), _watched(strategy.model, see):  # hooks are not compiled
            loss = forward_and_backward()
        see("loss", "this rank's loss", loss)
        strategy.step(update=False)
    finally:
        optimizer.observe = before
    phase = next((phase for phase in PHASES if phase in found), None)
    return _over_ranks((PHASES.index(phase), found[phase]) if phase else None)


@contextmanager
def _watched(model: torch.nn.Module, see: Callable[[str, str, Tensor], None]) -> Iterator[None]:
    """While open, what every module returns is looked at, and in backward the gradient of that."""
    handles = []
    for path, module in model.named_modules():
        path = path.removeprefix("module").removeprefix(".")  # DDP's and DeepSpeed's wrapping

        def look(_: Any, __: Any, output: Any, path: str = path) -> None:
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    see("forward", f"the output of {path} (forward)", tensor.detach())
                    if tensor.requires_grad:
                        tensor.register_hook(
                            lambda g: see("backward", f"the gradient of {path}'s output (backward)", g)
                        )

        if path:  # what the whole model returns is the loss
            handles.append(module.register_forward_hook(look))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _over_ranks(mine: tuple[int, str] | None) -> str:
    everyone: list[tuple[int, str] | None] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    seen = {rank: finding for rank, finding in enumerate(everyone) if finding}
    if not seen:
        return "all is finite when the same batch is repeated, so the fault was the machine's or of one moment"
    first = min(seen.values(), key=lambda finding: finding[0])
    ranks = [str(rank) for rank, finding in seen.items() if finding == first]
    return f"first not finite is {first[1]}, on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
