"""DeepSpeed's settings as the books of every stage read them, and its buckets. Plain Python, no torch.

The places named are those in DeepSpeed 0.19.8.
"""

from collections.abc import Sequence
from typing import Any

from strategies.ledger.terms import BF16, FP32, Entry, Modules, Scenario, StrategyBooks
from strategies.zero.defaults import DEFAULTS, replaced_defaults


class ZeroBooks(StrategyBooks):
    """What the stages have in common. See strategies.ledger.terms.StrategyBooks."""

    needs = "deepspeed"
    precision_in_words = "bf16 weights and gradients, float32 master weights in the optimizer's partition"

    def __init__(self, stage: int) -> None:
        self.stage = stage

    def default_engine(self, world_size: int) -> dict[str, Any]:
        return {"zero_optimization": {"stage": self.stage}}

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        zero = scenario.engine.get("zero_optimization", {})
        for key, harmless in UNKNOWN.items():
            if zero.get(key, "auto") not in ("auto", None, harmless):
                raise ValueError(
                    f"zero_optimization.{key}: {zero[key]!r} changes what DeepSpeed sends in a way that is not "
                    f"predicted; remove it, or write {harmless!r}."
                )
        return self.known_traffic(scenario, rank, modules)

    def known_traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        """`traffic`, for settings that are all known."""
        raise NotImplementedError


UNKNOWN = {
    "allgather_sequential": False,
    "parameter_alignment": False,
    "round_robin_gradients": False,
    "stage3_allgather_sequential": False,
    "stage3_module_granularity_threshold": 0,
    "stage3_use_all_reduce_for_fetch_params": False,
    "zero_hpz_partition_size": 1,
    "zero_quantized_gradients": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_weights": False,
}
"""Settings that change the traffic in ways not known here, with the value that leaves it alone."""


def deepspeed_live(stage: int, psi: int, largest_layer: int, ranks: int) -> dict[str, int]:
    """DeepSpeed's own estimator, called. Empty where DeepSpeed is not installed; it has none for stage 1."""
    try:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2
    except ImportError:
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
    return {**DEFAULTS, **replaced_defaults(scenario.parameters)}[key] if value == "auto" else value


def reduce_bucket(scenario: Scenario) -> int:
    """Elements of DeepSpeed's reduce bucket."""
    return int(setting(scenario, "reduce_bucket_size"))


def reduce_width(scenario: Scenario) -> int:
    """Bytes per element of a gradient on the wire: communication_data_type, else the model's dtype, whatever dtype
    gradients are accumulated in (`DeepSpeedEngine.communication_data_type`).
    """
    named = scenario.engine.get("communication_data_type")
    return (FP32 if named == "fp32" else BF16) if named else scenario.compute_bytes


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
