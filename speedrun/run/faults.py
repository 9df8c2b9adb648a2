"""A step whose numbers are wrong: whether it is one, where that began, and what to do about it.

The loss and the gradient's norm are means and sums over all ranks, so that all ranks see the same and decide alike. A
strategy changes no weight where the norm is not finite (`Strategy.step`), so the step can be repeated on the same
batch, watched: the first tensor that is not finite is where the trouble began. Where that is a weight or optimizer
state, no later step can count, and the run ends under every policy.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.config import Config
from speedrun.model.compiling import uncompiled
from speedrun.run.unread import ENOUGH, WINDOW
from strategies.base import Strategy
from strategies.loss_scale import LossScale

PATIENCE = 4
"""Steps in a row that may overflow with an fp16 loss scale that cannot fall any more. One may be of its batch alone."""

ROW = 20
"""Steps in a row that may be left out for a fault. So many are not of single batches: the state is finite, but it
trains no further."""

PHASES = ("weights", "state", "forward", "loss", "backward", "reduce")
"""In the order of a step: weights and optimizer state that the last update left, activations, the loss, gradients of
activations, and gradients of parameters, averaged over micro-batches and ranks."""


@dataclass(frozen=True)
class Found:
    """The first tensor that is not finite, in words; in_state: it is a weight or of the optimizer's state."""

    words: str
    in_state: bool = False


def loss_comes_first(config: Config) -> bool:
    """Whether the loss of all ranks must be known before the update: one that spikes has a finite gradient, which only
    the loss betrays. Otherwise the norm is enough, which the strategy looks at by itself.
    """
    return config.spike > 0 or config.on_nonfinite == "skip"


class Faults:
    """The policy of a run: `on_nonfinite` and `spike` of its configuration."""

    def __init__(self, config: Config, say: Callable[[str], None], no_way_on: Callable[[str], str] = str):
        """no_way_on: completes the sentence of a state that is not finite, with where to go on; collective."""
        self.policy, self.spike, self.say = config.on_nonfinite, config.spike, say
        self.early = loss_comes_first(config)
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.no_way_on = no_way_on
        self.row: list[str] = []
        """What was wrong with each step that was left out for a fault, since one that counted."""
        self.stuck = 0
        """Overflows in a row with a loss scale that could not fall."""

    def refuses(self, loss: float) -> bool:
        """Whether a step with this loss, the mean over all ranks, must change nothing."""
        return not math.isfinite(loss) or self._spikes(loss)

    def _spikes(self, loss: float) -> bool:
        enough = len(self.losses) >= ENOUGH
        return self.spike > 0 and enough and loss > self.spike * median(self.losses)

    def after_step(
        self, step: int, loss: float, norm: float, repeat: Callable[[], Found], scale: LossScale | None = None
    ) -> bool:
        """Whether the step counts. step: from 1; repeat: does it again, watched, and says where the trouble began;
        scale: fp16's, as the step has left it.

        In fp16 a norm that is not finite, of a loss that is, is an overflow. The step is left out and the scale falls,
        which is no fault; `PATIENCE` such steps with a scale that cannot fall are one.

        Raises FloatingPointError, with the same sentence on all ranks, where the policy is to stop; under any policy
        where the state is not finite, and after `ROW` faults in a row. Collective where the step does not count.
        """
        if math.isfinite(norm) and not self.refuses(loss):
            self.losses.append(loss)
            self.stuck = 0
            self.row = []
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
            found = repeat()
            what = f"{what} at step {step}; {found.words}"
            if found.in_state:
                raise FloatingPointError(self.no_way_on(what))
        self.row.append(what)
        if self.policy == "stop":
            raise FloatingPointError(f"{what}: lower the learning rates or clip, or pass --on-nonfinite skip.")
        if len(self.row) >= ROW:
            raise FloatingPointError(
                f"{ROW} steps in a row were left out, and the last because {what}: lower the "
                "learning rates or clip, or look at the data."
            )
        self.say(f"warning: {what}; the step was left out")
        return False

    def at_end(self) -> None:
        """Raises FloatingPointError where the last step of the run was left out for a fault: then it is not the run
        that was asked for."""
        if self.row:
            count = f"the last {len(self.row)} steps were" if len(self.row) > 1 else "the last step was"
            raise FloatingPointError(f"{count} left out: {self.row[-1]}; the weights are those of the step before.")

    def before_first(self, strategy: Strategy) -> None:
        """Look at the state that the run begins with. Raises FloatingPointError, on all ranks, where it is not finite.
        Collective."""
        found: dict[str, str] = {}
        _look_at_state(strategy, partial(_see, found))
        first = _over_ranks(found)
        if first.in_state:
            raise FloatingPointError(
                f"{first.words} before the first step. An untimed step, with learning rates of zero, can do that where "
                "the optimizer's settings mean nothing (optimizer.clip, betas, eps): correct them."
            )


def first_nonfinite(strategy: Strategy, forward_and_backward: Callable[[], Tensor]) -> Found:
    """Repeat a step without its update; returns on which ranks what was the first tensor not to be finite.

    forward_and_backward: on the same batch, returns the loss. Collective: all ranks call it together.
    """
    found: dict[str, str] = {}
    see = partial(_see, found)

    def see_parameters(phase: str, tensors: dict[str, Tensor]) -> None:
        if phase == "reduce":
            for name, gradient in tensors.items():
                see(phase, f"the reduced gradient of {name}", gradient)

    optimizer = strategy.optimizer
    _look_at_state(strategy, see)
    before, optimizer.observe = optimizer.observe, see_parameters
    try:
        with uncompiled(strategy.model), _watched(strategy.model, see):  # hooks are not compiled
            loss = forward_and_backward()
        see("loss", "this rank's loss", loss)
        strategy.step(update=False)
    finally:
        optimizer.observe = before
    return _over_ranks(found)


def _see(found: dict[str, str], phase: str, what: str, tensor: Tensor) -> None:
    """Keep the first of each phase that is not finite."""
    if phase not in found and torch.isfinite(tensor).logical_not().any():
        found[phase] = what


def _look_at_state(strategy: Strategy, see: Callable[[str, str, Tensor], None]) -> None:
    """This rank's weights and optimizer state."""
    optimizer = strategy.optimizer
    rank = optimizer.place.rank
    for piece in optimizer.all_slices():
        see("weights", f"the weight {piece.name}, since an update before", optimizer.weight(piece))
        if not piece.state[rank].numel or not optimizer.state.get(piece.holder):
            continue
        rule = optimizer.rules[piece.name]
        states = {buffer: optimizer.state_of(piece, buffer) for buffer in rule.buffers}
        if rule.matrix_buffers and optimizer.owners[piece.name] == rank:
            states |= optimizer.matrix_state(piece)
        for buffer, state in states.items():
            see("state", f"the {buffer} of {piece.name}, since an update before", state)


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


def _over_ranks(found: dict[str, str]) -> Found:
    """Of what each rank has found, the earliest. Collective."""
    phase = next((phase for phase in PHASES if phase in found), None)
    mine = (PHASES.index(phase), found[phase]) if phase else None
    everyone: list[tuple[int, str] | None] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    seen = {rank: finding for rank, finding in enumerate(everyone) if finding}
    if not seen:
        return Found("all is finite when the same batch is repeated, so the fault was the machine's or of one moment")
    first = min(seen.values(), key=lambda finding: finding[0])
    ranks = [str(rank) for rank, finding in seen.items() if finding == first]
    words = f"first not finite is {first[1]}, on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
    return Found(words, PHASES[first[0]] in ("weights", "state"))
