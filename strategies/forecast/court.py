"""The estimator court: what public estimators say a GPU holds in model states, beside ours, and why they differ.

What each says of a strategy stands in the strategy's books (`StrategyBooks.published`). DeepSpeed's and accelerate's
are called live, so what they print here is what the installed version says. The others are their published formulas.
All figures are bytes per GPU of parameters, master weights, gradients and optimizer states of AdamW in 16-bit mixed
precision; activations, buffers and the CUDA context are none of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from strategies import catalogue
from strategies.forecast.predict import predict_memory
from strategies.layout import Shape
from strategies.ledger.terms import MODEL_STATES, Group, Scenario


@dataclass(frozen=True)
class Testimony:
    """One estimator: bytes per strategy (None where it has no formula for it), and what sets it apart."""

    who: str
    source: str
    bytes: dict[str, int | None]
    why: str


ESTIMATORS = (
    (
        "ZeRO paper",
        "arXiv 1910.02054",
        "2 + 2 + 12 bytes per parameter: 16-bit weights and gradients, float32 master and two moments.",
    ),
    (
        "DeepSpeed",
        "estimate_zero*_model_states_mem_needs, called",
        "18/N instead of 14/N (zero2) or 16/N (zero3): counts a float32 gradient copy that exists only during the "
        "step; zero3 adds the largest layer gathered in float32. Has no zero1.",
    ),
    (
        "accelerate",
        "estimate-memory, called",
        "the largest of {model, gradients, optimizer, step}, not their sum, without sharding: two moments.",
    ),
    (
        "nanotron",
        "predict_memory of the Ultra-scale playbook",
        "keeps float32 gradients, whole, beside bf16 weights: 4 bytes per parameter where DeepSpeed has 2/N.",
    ),
    (
        "Megatron",
        "theoretical_memory_usage",
        "18 bytes: float32 main gradients; its distributed optimizer shards master and moments only.",
    ),
    (
        "Shardrun",
        "the strategies' books",
        "what this torch and this DeepSpeed really keep just before the step, padding included: ddp and fsdp hold "
        "float32 weights and gradients (autocast, or a bf16 gather); zero1 without accumulation frees gradients "
        "that other ranks own, so it equals zero2.",
    ),
)
"""Who, where from, and what sets it apart."""


def accelerate_live(psi: int) -> int:
    """accelerate estimate-memory's training column, called: the largest of its four figures, whatever the strategy."""
    from accelerate.commands.estimate import estimate_training_usage

    return int(max(estimate_training_usage(4 * psi, "bfloat16").values()))


def ours(strategy: str, shapes: dict[str, Shape], groups: Sequence[Group], n: int) -> int:
    """What Shardrun predicts: just before an optimizer step in bf16, on the rank that holds most."""
    ranks = predict_memory(Scenario(strategy, shapes, groups, n, "bf16"))
    return max(sum(rank["after backward"][c] for c in MODEL_STATES) for rank in ranks)


def hear(shapes: dict[str, Shape], groups: Sequence[Group], world_size: int, largest_layer: int) -> list[Testimony]:
    """All of them for one model. groups: AdamW for everything, which is what the others assume."""
    psi = Scenario("single", shapes, groups, 1).parameters
    accelerate = accelerate_live(psi)
    said = {
        name: {
            **catalogue.books(name).published(psi, world_size, largest_layer),
            "accelerate": accelerate,
            "Shardrun": ours(name, shapes, groups, world_size),
        }
        for name in catalogue.spread()
    }
    return [
        Testimony(who, source, {name: figures.get(who) for name, figures in said.items()}, why)
        for who, source, why in ESTIMATORS
    ]
