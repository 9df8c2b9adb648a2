"""DeepSpeed's settings as the books of every stage read them, and its buckets. Plain Python, no torch.

The places named are those in DeepSpeed 0.19.8.
"""

from collections.abc import Sequence
from typing import Any

from strategies.errors import UserError
from strategies.ledger.terms import Resolved, Scenario, StrategyBooks
from strategies.zero.defaults import DEFAULTS, WIDTHS, replaced_defaults
from strategies.zero.settings import unpredicted


class ZeroBooks(StrategyBooks):
    """What the stages have in common. See strategies.ledger.terms.StrategyBooks."""

    needs = "deepspeed"
    precision_in_words = "16-bit weights and gradients, float32 master weights in the optimizer's partition"

    def __init__(self, stage: int) -> None:
        self.stage = stage

    def default_engine(self, world_size: int) -> dict[str, Any]:
        return {"zero_optimization": {"stage": self.stage}}

    def settings(self, scenario: Scenario) -> list[Resolved]:
        said = scenario.engine.get("zero_optimization", {})
        keys = BUCKETS | (STAGE_3 if self.stage == 3 else FLAT)
        lines = []
        for key, effect in keys.items():
            value, given = setting(scenario, key), said.get(key, "auto") not in ("auto", None)
            if key.endswith("bucket_size"):
                effect += f", {reduce_width(scenario) * int(value) / 2**20:,.1f} MiB"
                effect += "" if given or value < scenario.parameters else " (ours: at most the model's size)"
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
            lines.append(Resolved(key, "no limit" if value == 2**63 - 1 else shown, effect, given))
        for part in ("offload_optimizer", "offload_param"):
            device = (said.get(part) or {}).get("device", "none")
            lines.append(Resolved(f"{part}.device", device, "none: it stays on the GPU", part in said))
        return lines

    def not_predicted(self, scenario: Scenario) -> dict[str, str]:
        return unpredicted(self.stage, scenario.precision, scenario.engine)


BUCKETS = {
    "reduce_bucket_size": "elements of the bucket that gradients are reduced in",
    "contiguous_gradients": "true: gradients are copied into that bucket",
    "reduce_scatter": "true: a rank gets what its slice needs, out of one more copy of the bucket",
    "overlap_comm": "true: a second bucket is filled while the first is reduced",
}
"""Setting of `zero_optimization` → what it decides."""

FLAT = {
    "round_robin_gradients": "true: parameters are dealt out over the slices",
    "parameter_alignment": "true: every parameter begins at a multiple of 16 bytes",
}
"""The same of ZeRO-1 and -2 alone."""

STAGE_3 = {
    "stage3_prefetch_bucket_size": "elements gathered ahead of their use",
    "stage3_max_live_parameters": "elements that are gathered at once at most",
    "stage3_max_reuse_distance": "elements: what is used again within so many stays gathered",
    "stage3_param_persistence_threshold": "elements: smaller parameters stay whole (ours: 0)",
    "stage3_model_persistence_threshold": "elements of those together at most",
    "sub_group_size": "elements that the optimizer updates at once",
}
"""The same of ZeRO-3 alone."""


def deepspeed_live(stage: int, psi: int, largest_layer: int, ranks: int) -> dict[str, int]:
    """DeepSpeed's own estimator, called. Empty where DeepSpeed is not installed; it has none for stage 1."""
    import torch

    from strategies.zero.engine import import_deepspeed

    try:
        import_deepspeed(torch.device("cpu"))  # quietly: it would write into what --json prints
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2
    except (ImportError, UserError):
        return {}
    if stage == 2:
        return {"DeepSpeed": zero2(psi, num_gpus_per_node=ranks, cpu_offload=False)[1]}
    if stage == 3:
        on_gpu = {"cpu_offload": False, "cpu_offload_params": False}
        return {"DeepSpeed": zero3(psi, largest_layer, num_gpus_per_node=ranks, **on_gpu)[1]}
    return {}


def setting(scenario: Scenario, key: str) -> Any:
    """A setting of DeepSpeed's `zero_optimization`, completed as strategies/zero/engine.py completes it."""
    value = scenario.engine.get("zero_optimization", {}).get(key, "auto")
    if value in ("auto", None):  # null is DeepSpeed's "by the stage" for overlap_comm
        return {**DEFAULTS, **replaced_defaults(scenario.parameters)}[key]
    return value


def reduce_bucket(scenario: Scenario) -> int:
    """Elements of DeepSpeed's reduce bucket."""
    return int(setting(scenario, "reduce_bucket_size"))


def reduce_width(scenario: Scenario) -> int:
    """Bytes per element of a gradient on the wire: communication_data_type, else the model's dtype, whatever dtype
    gradients are accumulated in (`DeepSpeedEngine.communication_data_type`).
    """
    named = scenario.engine.get("communication_data_type")
    return WIDTHS[named.lower()] if named else scenario.compute_bytes


def closed_buckets(numels: Sequence[int], limit: int) -> int:
    """Buckets that are sent off once they hold more than `limit` elements (`allreduce_no_retain`)."""
    buckets, filled = 0, 0
    for numel in numels:
        filled += numel
        if filled > limit:
            buckets, filled = buckets + 1, 0
    return buckets + (filled > 0)


def fill_buckets(scenario: Scenario, order: Sequence[str]) -> list[list[str]]:
    """DeepSpeed's gradient buckets (`reduce_independent_p_g_buckets_and_remove_grads`): full before a gradient that
    would exceed reduce_bucket_size; a larger gradient goes alone.

    order: in which gradients come: as backward produces them, for which the books take the reverse of the names.
    """
    limit = reduce_bucket(scenario)
    buckets: list[list[str]] = []
    filled = 0
    for name in order:
        if not buckets or filled + scenario.numel(name) > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(name)
        filled += scenario.numel(name)
    return buckets
