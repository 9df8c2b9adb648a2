"""DeepSpeed's defaults, and what stands in the place of those made for large models. Plain Python, no torch.

engine.py gives the replaced ones to DeepSpeed, and books.py reads the same, wherever the config file is silent.
"""

from typing import Any

DEFAULTS = {
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": True,
    "overlap_comm": False,
    "compute_grad_norm": True,
    "sub_group_size": 1_000_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_model_persistence_threshold": 2**63 - 1,
}
"""DeepSpeed's own (runtime/zero/config.py), where the books depend on them and nothing is replaced."""


def replaced_defaults(parameters: int) -> dict[str, int]:
    """Keys of `zero_optimization` for a model of so many elements.

    Buckets of 5e8 elements would be allocated whole whatever the model's size, so they are capped at the model's
    size; and parameters of up to 1e5 elements would stay whole under ZeRO-3, which is most of a small model: the
    threshold is 0.
    """
    return {
        "reduce_bucket_size": min(500_000_000, parameters),
        "stage3_prefetch_bucket_size": min(50_000_000, parameters),
        "stage3_param_persistence_threshold": 0,
    }


def accumulates_float32(precision: str, engine: dict[str, Any]) -> bool:
    """Whether DeepSpeed adds up a bf16 model's gradients in float32: `data_types` of its own config file says so."""
    named = engine.get("data_types", {}).get("grad_accum_dtype")
    return precision == "bf16" and named in ("fp32", "float32", "float", "torch.float32")
