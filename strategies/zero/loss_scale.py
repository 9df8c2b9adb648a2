"""DeepSpeed's own loss scaler, as the run and its checkpoints see it (strategies.loss_scale.LossScale).

DeepSpeed moves the scale in the middle of its step, before it divides the gradients by it (`_update_scale` comes before
`unscale_and_clip_grads` in stage_1_and_2.py and stage3.py, 0.19.8). In a step that doubles the scale it so divides by
twice what the loss was multiplied with: the update is made from half the gradient. `take_over` holds its call back, and
we make it after the step; the rule and its counters stay DeepSpeed's.
"""

from collections.abc import Mapping
from typing import Any


class DeepSpeedLossScale:
    """See the module's docstring."""

    def __init__(self, scaler: Any):
        """scaler: deepspeed.runtime.fp16.loss_scaler's DynamicLossScaler, or LossScaler for a fixed scale."""
        self.scaler, self.dynamic = scaler, bool(scaler.dynamic)
        if self.dynamic:
            # It would raise a bare Exception there; what many overflows mean is the run's to say (speedrun/run/faults).
            scaler.raise_error_at_min_scale = False

    @property
    def value(self) -> float:
        return float(self.scaler.cur_scale)

    @property
    def can_fall(self) -> bool:
        return self.dynamic and self.value > self.scaler.min_scale

    def update(self, overflow: bool) -> None:
        self.scaler.update_scale(overflow)

    def state(self) -> dict[str, Any]:
        if not self.dynamic:
            return {"scale": self.value, "clean_steps": 0}
        clean = self.scaler.cur_iter - self.scaler.last_overflow_iter - 1
        return {"scale": self.value, "clean_steps": clean, "hysteresis": self.scaler.cur_hysteresis}

    def load(self, state: Mapping[str, Any]) -> None:
        """A fixed scale stays what the config says."""
        if not self.dynamic:
            return
        scaler = self.scaler
        scaler.cur_scale = max(float(state["scale"]), float(scaler.min_scale))
        scaler.last_overflow_iter, scaler.cur_iter = -1, int(state["clean_steps"])
        scaler.cur_hysteresis = min(int(state.get("hysteresis", scaler.delayed_shift)), scaler.delayed_shift)


def take_over(zero: Any) -> DeepSpeedLossScale:
    """The scale of DeepSpeed's ZeRO optimizer, which from now on moves it only when `update` is called."""
    zero._update_scale = lambda has_overflow=False: None
    return DeepSpeedLossScale(zero.loss_scaler)
