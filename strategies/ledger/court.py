"""The estimator court: what public estimators say a GPU holds in model states, beside ours, and why they differ.

DeepSpeed's and accelerate's are called live, so what they print here is what the installed version says. The others are
their published formulas. All figures are bytes per GPU of parameters, master weights, gradients and optimizer states of
AdamW in 16-bit mixed precision; activations, buffers and the CUDA context are none of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from strategies.layout import Shape
from strategies.ledger.predict import MODEL_STATES, Group, Run, predict_memory

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@dataclass(frozen=True)
class Testimony:
    """One estimator: bytes per strategy (None where it has no formula for it), and what sets it apart."""

    who: str
    source: str
    bytes: dict[str, int | None]
    why: str


def zero_paper(psi: int, n: int, k: int = 12) -> dict[str, int]:
    """Rajbhandari et al., "ZeRO", arXiv 1910.02054, §3 and §5: 2 bytes of parameters, 2 of gradients, K of the rest."""
    return {
        "ddp": (4 + k) * psi,
        "zero1": 4 * psi + k * psi // n,
        "zero2": 2 * psi + (2 + k) * psi // n,
        "zero3": (4 + k) * psi // n,
    }


def nanotron(psi: int, n: int) -> dict[str, int]:
    """predict_memory, the Ultra-scale playbook's tool: 2Ψ parameters, 4Ψ float32 gradients, (4 + 8)Ψ/N of optimizer.

    Only for ZeRO-1 and -2: what it prints for the others does not follow from this formula.
    """
    return {"zero1": 6 * psi + 12 * psi // n, "zero2": 6 * psi + 12 * psi // n}


def megatron(psi: int, n: int) -> dict[str, int]:
    """Megatron-LM's theoretical memory: 18 bytes per parameter, or 6 + 12/N with the distributed optimizer (ZeRO-1)."""
    return {"ddp": 18 * psi, "zero1": 6 * psi + 12 * psi // n}


def deepspeed_live(psi: int, largest_layer: int, n: int) -> dict[str, int]:
    """DeepSpeed's own estimators, called. Empty where DeepSpeed is not installed."""
    try:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2
    except ImportError:
        return {}
    return {
        "zero2": zero2(psi, num_gpus_per_node=n, cpu_offload=False)[1],
        "zero3": zero3(psi, largest_layer, num_gpus_per_node=n, cpu_offload=False, cpu_offload_params=False)[1],
    }


def accelerate_live(psi: int) -> dict[str, int]:
    """accelerate estimate-memory's training column, called: the largest of its four figures, for every strategy
    alike.
    """
    from accelerate.commands.estimate import estimate_training_usage

    total = max(estimate_training_usage(4 * psi, "bfloat16").values())
    return dict.fromkeys(STRATEGIES, total)


def ours(shapes: dict[str, Shape], groups: Sequence[Group], n: int) -> dict[str, int]:
    """What Shardrun predicts: just before an optimizer step in bf16, on the rank that holds most."""
    result = {}
    for strategy in STRATEGIES:
        ranks = predict_memory(Run(strategy, shapes, groups, n, "bf16"))
        result[strategy] = max(sum(rank["after backward"][c] for c in MODEL_STATES) for rank in ranks)
    return result


def hear(shapes: dict[str, Shape], groups: Sequence[Group], world_size: int, largest_layer: int) -> list[Testimony]:
    """All of them for one model. groups: AdamW for everything, which is what the others assume."""
    psi = Run("single", shapes, groups, 1).parameters

    def complete(figures: dict[str, int]) -> dict[str, int | None]:
        return {strategy: figures.get(strategy) for strategy in STRATEGIES}

    return [
        Testimony(
            "ZeRO paper",
            "arXiv 1910.02054",
            complete(zero_paper(psi, world_size)),
            "2 + 2 + 12 bytes per parameter: 16-bit weights and gradients, float32 master and two moments.",
        ),
        Testimony(
            "DeepSpeed",
            "estimate_zero*_model_states_mem_needs, called",
            complete(deepspeed_live(psi, largest_layer, world_size)),
            "18/N in place of 14/N (zero2) or 16/N (zero3): counts a float32 gradient copy that exists only during the "
            "step; zero3 adds the largest layer gathered in float32. Has no zero1.",
        ),
        Testimony(
            "accelerate",
            "estimate-memory, called",
            complete(accelerate_live(psi)),
            "the largest of {model, gradients, optimizer, step}, not their sum, without sharding: two moments.",
        ),
        Testimony(
            "nanotron",
            "predict_memory of the Ultra-scale playbook",
            complete(nanotron(psi, world_size)),
            "keeps float32 gradients, whole, beside bf16 weights: 4 bytes per parameter where DeepSpeed has 2/N.",
        ),
        Testimony(
            "Megatron",
            "theoretical_memory_usage",
            complete(megatron(psi, world_size)),
            "18 bytes: float32 main gradients; its distributed optimizer shards master and moments only.",
        ),
        Testimony(
            "Shardrun",
            "strategies/ledger/predict.py",
            complete(ours(shapes, groups, world_size)),
            "what this torch and this DeepSpeed really keep just before the step, padding included: ddp and fsdp hold "
            "float32 weights and gradients (autocast, or a bf16 gather); zero1 without accumulation frees gradients "
            "that other ranks own, so it equals zero2.",
        ),
    ]
