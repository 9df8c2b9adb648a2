"""DeepSpeed's defaults, and what stands in the place of those made for large models. Plain Python, no torch.

engine.py gives the replaced ones to DeepSpeed, and books.py reads the same, wherever the config file is silent.
"""

from typing import Any

from strategies.zero.settings import DTYPES

DEFAULTS = {
    "round_robin_gradients": False,
    "parameter_alignment": False,
    "enable_sanity_checks": False,
    "stage3_allgather_sequential": False,
    "stage3_use_all_reduce_for_fetch_params": False,
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


WIDTHS = {name: 4 if dtype == "fp32" else 2 for name, dtype in DTYPES.items()}
"""DeepSpeed's names of a dtype → bytes per element."""


def compute_width(precision: str) -> int:
    """Bytes per element of the model's dtype."""
    return 4 if precision == "fp32" else 2


def accumulation_width(precision: str, engine: dict[str, Any]) -> int:
    """Bytes per element of a gradient as it is added up over micro-batches: data_types.grad_accum_dtype, else the
    model's dtype.
    """
    named = engine.get("data_types", {}).get("grad_accum_dtype")
    return WIDTHS[named] if named else compute_width(precision)


def accumulates_float32(precision: str, engine: dict[str, Any]) -> bool:
    """Whether DeepSpeed adds up a 16-bit model's gradients in float32: `data_types` of its own config file says so."""
    return accumulation_width(precision, engine) > compute_width(precision)


def alignment(precision: str, engine: dict[str, Any]) -> int:
    """Elements at a multiple of which every parameter begins in ZeRO-1/2's flat buffers: parameter_alignment asks for
    16 bytes.
    """
    aligned = engine.get("zero_optimization", {}).get("parameter_alignment") is True
    return 16 // compute_width(precision) if aligned else 1


def is_bf16_optimizer(stage: int, precision: str, engine: dict[str, Any]) -> bool:
    """Whether ZeRO-1 is another class of DeepSpeed's, BF16_Optimizer (`_do_optimizer_sanity_check` in engine.py)."""
    return stage == 1 and precision == "bf16" and accumulates_float32(precision, engine)
