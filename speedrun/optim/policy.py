"""Which parameter is updated by which rule, as one table.

The policy is decided from names and shapes alone, before any strategy touches the model: afterwards a parameter may
be a shard, a flat slice or a reference, and neither its shape nor its number of dimensions can be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from speedrun.config import Kernels, OptimizerConfig
from speedrun.ranges import check_ranges
from strategies.errors import UserError

if TYPE_CHECKING:
    from speedrun.optim.rules import AdamW, Muon

Shape = tuple[int, ...]

KINDS = ("block matrix", "embedding", "head", "table", "gate", "vector")
"""The rows of the policy table."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a rule and its options. `options["lr"]` is the peak; the schedule multiplies it."""

    name: str
    rule: AdamW | Muon
    parameters: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def kind_of(name: str, shape: Shape) -> str:
    """The row of the policy table for a parameter: block matrix, embedding, head, table, gate or vector.

    A gate is thin, and what its few rows do is not a matrix's work. The projection of a narrow n-gram table is a matrix
    like those of the blocks.
    """
    if len(shape) < 2:
        return "vector"
    if name.endswith(".gate.weight"):
        return "gate"
    if name.endswith(".table.weight"):
        return "table"
    if name.startswith("blocks.") or name.endswith(".up.weight"):
        return "block matrix"
    return "head" if name.startswith("head.") else "embedding"


def check_optimizer(config: OptimizerConfig, factor: float = 1.0) -> None:
    """Raise ValueError where a field is out of its range, or two contradict each other.

    factor: on all rates, the largest that a stage has.
    """
    check_ranges(config, "optimizer.")
    if config.normuon and config.name != "muon":
        raise UserError(
            f"optimizer.normuon changes Muon's update, but optimizer.name = {config.name} has none: use one of the two"
        )
    matrices = ("muon_lr", "muon_weight_decay") if config.name == "muon" else ("adamw_lr", "weight_decay")
    for rate, decay in (matrices, *((f"{kind}_lr", "weight_decay") for kind in ("embedding", "head", "table"))):
        lr, share = getattr(config, rate), getattr(config, decay)
        if share * lr * factor > 1:
            raise UserError(
                f"optimizer.{decay} is {share} and optimizer.{rate} {lr * factor:g} at most: a step would multiply "
                f"weights by 1 − {lr * factor * share:g}, below 0; lower one of them"
            )


def parameter_groups(
    shapes: dict[str, Shape], config: OptimizerConfig, kernels: Kernels = "torch"
) -> list[ParameterGroup]:
    """Resolve the table for a model's parameters.

    shapes: parameter name → shape, in the model's order, a tied weight once; kernels: who computes Muon's products
    (see `ModelConfig`). Returns the non-empty groups in the table's order. Muon is for the matrices inside the blocks
    only: an embedding's rows are looked up, not multiplied, so its gradient's singular values mean nothing, and a
    head's rows have wanted norms of their own. A gate's few rows turn single heads up and down and have nothing to do
    with one another.

    Raises ValueError where options contradict each other.
    """
    from speedrun.optim.rules import AdamW, Muon, NorMuon  # here, so that the books can ask `kind_of` without torch

    check_optimizer(config)
    cautious = {"cautious": True} if config.cautious_weight_decay else {}
    sharded = {"sharded": True} if config.sharded_adam else {}
    adamw = {"betas": config.betas, "eps": config.eps, **cautious, **sharded}
    muon = {
        "lr": config.muon_lr,
        "momentum": config.muon_momentum,
        "weight_decay": config.muon_weight_decay,
        "orthogonalization": config.orthogonalization,
        "orthogonalization_steps": config.orthogonalization_steps,
        "orthogonalization_dtype": config.orthogonalization_dtype,
        "kernels": kernels,
        **({"beta2": config.normuon_beta2} if config.normuon else {}),
        **cautious,
    }
    accumulates = config.adamw_every > 1
    decay = config.weight_decay
    # kind           rule       options
    table: dict[str, tuple[AdamW | Muon, dict[str, Any]]] = {
        "block matrix": (
            (NorMuon() if config.normuon else Muon(), muon)
            if config.name == "muon"
            else (AdamW(accumulates), {"lr": config.adamw_lr, "weight_decay": decay, **adamw})
        ),
        "embedding": (AdamW(accumulates), {"lr": config.embedding_lr, "weight_decay": decay, **adamw}),
        "head": (AdamW(accumulates), {"lr": config.head_lr, "weight_decay": decay, **adamw}),
        "table": (AdamW(accumulates), {"lr": config.table_lr, "weight_decay": decay, **adamw}),
        "gate": (AdamW(accumulates), {"lr": config.gate_lr, "weight_decay": 0.0, **adamw}),
        "vector": (AdamW(accumulates), {"lr": config.vector_lr, "weight_decay": 0.0, **adamw}),
    }
    groups = []
    for kind, (rule, options) in table.items():
        names = tuple(name for name, shape in shapes.items() if kind_of(name, shape) == kind)
        if names:
            groups.append(ParameterGroup(kind, rule, names, options))
    return groups
