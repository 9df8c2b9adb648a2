"""DeepSpeed's settings together: which of them the books do not follow, and which do not go with one another.

What each does by itself is in json_keys.py, whose names are used here too. Of those that change memory or traffic the
books follow all but NOT_PREDICTED. Plain Python, no torch. As DeepSpeed 0.19.8 reads them.
"""

from collections.abc import Mapping
from typing import Any

ZERO = "zero_optimization."

DTYPES = {
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "fp32"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
}
"""DeepSpeed's names of a dtype (`DtypeEnum` in runtime/config.py) → ours."""

NOT_PREDICTED: dict[str, tuple[Any, tuple[str, ...]]] = {
    ZERO + "leaf_module": ({}, ("parameters", "all_gather", "reduce_scatter", "all_reduce")),
    ZERO + "stage3_module_granularity_threshold": (0, ("parameters", "all_gather", "reduce_scatter", "all_reduce")),
    ZERO + "zero_hpz_partition_size": (1, ("parameters", "all_gather")),
    ZERO + "zero_quantized_weights": (False, ("parameters", "all_gather")),
    ZERO + "zero_quantized_nontrainable_weights": (False, ("parameters", "all_gather")),
    ZERO + "zero_quantized_gradients": (False, ("reduce_scatter", "all_to_all")),
}
"""Key → the value that changes nothing, and what it changes in the books otherwise: categories of memory, collectives.
All of ZeRO-3; ZeRO-1 and -2 do not read them."""


def value(engine: Mapping[str, Any], key: str) -> Any:
    """What DeepSpeed's JSON says under a dotted key; None where it says nothing."""
    section, _, name = key.rpartition(".")
    found = (engine.get(section) or {}).get(name) if section else engine.get(name)
    return None if found == "auto" else found


def unpredicted(stage: int, precision: str, engine: Mapping[str, Any]) -> dict[str, str]:
    """Line of the books (a category of memory, a collective) → the key for which it is not predicted."""
    lines: dict[str, str] = {}
    if stage == 3:
        for key, (neutral, changed) in NOT_PREDICTED.items():
            if value(engine, key) not in (None, neutral, 0):
                for line in changed:
                    lines.setdefault(line, key)
    if stage == 1 and (accumulates := value(engine, "data_types.grad_accum_dtype")):
        own = {"fp32": "fp32", "bf16": "bf16"}.get(precision, "fp16")
        # Gradients are added up in tensors of another dtype, which live in the bucket for a while. (float32 under bf16
        # is another class of DeepSpeed's, and predicted.)
        if DTYPES[accumulates] != own and (precision, DTYPES[accumulates]) != ("bf16", "fp32"):
            lines |= dict.fromkeys(("gradients", "communication buffers"), "data_types.grad_accum_dtype")
    return lines


def zero_refusal(
    stage: int, precision: str, engine: Mapping[str, Any], ranks: int, cpu: bool = False
) -> tuple[str, str] | None:
    """The first setting that cannot run beside the others, and why, with the way out; None where all can.

    stage: 1, 2 or 3; ranks: of the launch; cpu: whether it is one on CPUs, which have no kernels to quantize.
    """
    if (named := value(engine, "data_types.param_dtype")) and DTYPES[named] != precision:
        return "data_types.param_dtype", f"the model computes in {precision}; remove it, or write {precision}"
    if (size := value(engine, ZERO + "zero_hpz_partition_size")) and stage == 3 and ranks % min(int(size), ranks):
        return ZERO + "zero_hpz_partition_size", f"it does not divide {ranks} ranks; write one that does"
    for kind in ("weights", "nontrainable_weights", "gradients"):
        if cpu and stage == 3 and value(engine, f"{ZERO}zero_quantized_{kind}"):
            return f"{ZERO}zero_quantized_{kind}", "its kernels need a GPU; remove it"
    scatters = value(engine, ZERO + "reduce_scatter") is not False
    if stage > 1 and scatters and value(engine, "prescale_gradients"):
        return "prescale_gradients", f"ZeRO-{stage} takes it with reduce_scatter: false only; remove it, or write that"
    factor = value(engine, "gradient_predivide_factor")
    if factor not in (None, 1):
        if stage == 2 and scatters:
            return "gradient_predivide_factor", "ZeRO-2 takes it with reduce_scatter: false only; remove it"
        if stage == 3:  # `__avg_scatter_grads` does not multiply back where the factor is the number of ranks
            return "gradient_predivide_factor", "ZeRO-3 does not average with it in every case; remove it"
    return None
