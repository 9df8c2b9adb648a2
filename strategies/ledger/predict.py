"""Predicted memory: what every rank holds, in bytes by category, from shapes, dtypes, world size and settings alone.

Plain Python, no torch: no weights, no process group, milliseconds for any size. Nothing here has ever seen a live
tensor. What frameworks really keep differs from the formulas of papers, and the differences are named where they
arise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from strategies.layout import Shape, equal_cuts, flat_partition, flat_partition_size, row_blocks
from strategies.owners import assign_owners
from strategies.zero_defaults import DEFAULTS, replaced_defaults

FP32, BF16 = 4, 2
"""Bytes per element."""

CATEGORIES = ("parameters", "master parameters", "gradients", "optimizer states", "communication buffers")
MODEL_STATES = CATEGORIES[:4]
MOMENTS = ("after prepare", "after backward", "after step")
"""When: before the first step; before an optimizer step, all gradients there; after one, gradients cleared."""

Held = dict[str, int]
"""Bytes by category."""


@dataclass(frozen=True)
class Group:
    """Parameters under one rule. `whole_matrix`: Muon (one buffer per element), else AdamW (two, and a step count)."""

    name: str
    parameters: tuple[str, ...]
    whole_matrix: bool
    second_moments: bool = False
    """NorMuon: the owner of a matrix also keeps one number per row or column, whichever are more."""
    accumulates: bool = False
    """AdamW that does not update at every step: it also keeps a sum of gradients per element."""

    @property
    def state_bytes(self) -> int:
        """Optimizer state per element: Muon's momentum 4, AdamW's two moments 8 (and a sum 4); in float32 always."""
        return FP32 if self.whole_matrix else (3 if self.accumulates else 2) * FP32

    @property
    def holder_bytes(self) -> int:
        """Per tensor that the optimizer updates: AdamW keeps a step count."""
        return 0 if self.whole_matrix else FP32


@dataclass(frozen=True)
class Run:
    """All that a prediction needs. shapes: name → shape, in the model's order, a tied weight once."""

    strategy: str
    shapes: dict[str, Shape]
    groups: Sequence[Group]
    world_size: int
    precision: str = "fp32"
    accumulation: int = 1
    engine: dict[str, Any] = field(default_factory=dict)

    def numel(self, name: str) -> int:
        return math.prod(self.shapes[name])

    @cached_property
    def parameters(self) -> int:
        """Ψ: elements of the model."""
        return sum(self.numel(name) for name in self.shapes)


def predict_memory(run: Run) -> list[dict[str, Held]]:
    """For every rank: moment → category → bytes. Linear in parameters plus ranks, so also for thousands of ranks."""
    strategies: dict[str, Callable[[Run], list[dict[str, Held]]]] = {
        "single": _single,
        "ddp": _ddp,
        "fsdp": _fsdp,
        "zero1": _zero12,
        "zero2": _zero12,
        "zero3": _zero3,
    }
    ranks = strategies[run.strategy](run)
    for group in run.groups:
        for rank, size in zip(ranks, second_moments(run, group), strict=True):
            for moment in MOMENTS[1:]:
                rank[moment]["optimizer states"] += size
    return ranks


def second_moments(run: Run, group: Group) -> list[int]:
    """For every rank: bytes of NorMuon's state of the matrices that it owns, in full whatever part of them it holds."""
    owned = [0] * run.world_size
    if group.second_moments:
        owners = matrix_owners(run)
        for name in group.parameters:
            owned[owners[name]] += FP32 * max(run.shapes[name])
    return owned


def matrix_owners(run: Run) -> dict[str, int]:
    """Every matrix's owner as the optimizer assigns it: under FSDP and ZeRO all that is two-dimensional counts as load,
    under whatever rule; under DDP only the matrices that are kept out of its buckets.
    """
    names = [name for group in run.groups for name in group.parameters]
    if run.strategy in ("single", "ddp"):
        return assign_owners(
            {n: run.shapes[n] for g in run.groups if g.whole_matrix for n in g.parameters}, run.world_size
        )
    if run.strategy == "fsdp":
        held = {name: row_blocks(shape, run.world_size) for name, shape in run.shapes.items()}
    elif run.strategy == "zero3":
        held = {name: equal_cuts(run.shapes[name], run.world_size) for name in names}
    else:
        by_group = [{name: run.shapes[name] for name in group.parameters} for group in run.groups]
        held = {name: cuts for group in by_group for name, cuts in flat_partition(group, run.world_size).items()}
    held = {name: cuts for name, cuts in held.items() if len(run.shapes[name]) == 2}
    return assign_owners({name: run.shapes[name] for name in held}, run.world_size, held)


def predict_states(run: Run) -> list[dict[str, int]]:
    """For every rank: group → bytes of its optimizer state. What lies like the weights does not depend on the other
    groups; who owns a matrix does.
    """
    by_group = {}
    for group in run.groups:
        shapes = {name: run.shapes[name] for name in group.parameters}
        alone = replace(run, shapes=shapes, groups=[replace(group, second_moments=False)])
        ranks = [rank["after step"]["optimizer states"] for rank in predict_memory(alone)]
        by_group[group.name] = [sum(sizes) for sizes in zip(ranks, second_moments(run, group), strict=True)]
    return [{name: ranks[rank] for name, ranks in by_group.items()} for rank in range(run.world_size)]


def _moments(
    parameters: int, masters: int, gradients: int, states: int, resident: int = 0, buffers: int = 0
) -> dict[str, Held]:
    """The three moments; `resident`, `buffers`: gradients and buffers that stay allocated between steps too."""
    base = {"parameters": parameters, "master parameters": masters, "communication buffers": buffers}
    return {
        "after prepare": {**base, "gradients": resident, "optimizer states": 0},
        "after backward": {**base, "gradients": gradients, "optimizer states": states},
        "after step": {**base, "gradients": resident, "optimizer states": states},
    }


def _single(run: Run) -> list[dict[str, Held]]:
    """Everything, in float32; under bf16 too, because autocast casts a weight for the moment of its use."""
    states = sum(g.state_bytes * run.numel(n) + g.holder_bytes for g in run.groups for n in g.parameters)
    return [_moments(FP32 * run.parameters, 0, FP32 * run.parameters, states)]


def _ddp(run: Run) -> list[dict[str, Held]]:
    """As single, but a matrix's momentum is kept by its owner alone.

    Gradients are views of DDP's buckets, so they count once; and the buckets, which hold the gradients of all that has
    no owner, stay when gradients are cleared.
    """
    matrices = {n: run.shapes[n] for g in run.groups if g.whole_matrix for n in g.parameters}
    owners = assign_owners(matrices, run.world_size)
    replicated, owned = 0, [0] * run.world_size
    for g in run.groups:
        for n in g.parameters:
            if n in owners:
                owned[owners[n]] += g.state_bytes * run.numel(n)
            else:
                replicated += g.state_bytes * run.numel(n) + g.holder_bytes
    whole = FP32 * run.parameters
    buckets = FP32 * sum(run.numel(n) for n in run.shapes if n not in owners)
    return [_moments(whole, 0, whole, replicated + mine, resident=buckets) for mine in owned]


def _fsdp(run: Run) -> list[dict[str, Held]]:
    """A block of rows of everything, in float32 under bf16 too (bf16 exists gathered only).

    Parameters and gradients are padded to the largest block on every rank, because the collectives work on equal parts;
    optimizer state is not.
    """
    padded, states = 0, [0] * run.world_size
    for g in run.groups:
        for n in g.parameters:
            rows, row = run.shapes[n][0], math.prod(run.shapes[n][1:])
            block = math.ceil(rows / run.world_size)
            padded += block * row
            for rank in range(math.ceil(rows / block)):  # the ranks that hold any of it
                mine = min(block, rows - rank * block)
                states[rank] += g.state_bytes * mine * row + g.holder_bytes
    return [_moments(FP32 * padded, 0, FP32 * padded, mine) for mine in states]


def _zero12(run: Run) -> list[dict[str, Held]]:
    """Whole parameters in the model's dtype; master weights and state for one slice of every group's flat buffer.

    bf16 with float32 accumulation: ZeRO-1 is another class of DeepSpeed's then, BF16_Optimizer, which keeps whole
    float32 gradients, padding included, from the start on, beside a micro-batch's own; ZeRO-2 accumulates its slice.
    """
    width = BF16 if run.precision == "bf16" else FP32
    parameters = masters = 0
    gradients, states = [0] * run.world_size, [0] * run.world_size
    for g in run.groups:
        numels = [run.numel(n) for n in g.parameters]
        part = flat_partition_size(numels, run.world_size)
        parameters += width * part * run.world_size
        masters += FP32 * part
        offset = 0
        for numel in numels:
            # A parameter that a boundary cuts keeps its whole gradient alive, on both sides of the boundary.
            for rank in range(offset // part, (offset + numel - 1) // part + 1):
                gradients[rank] += width * numel
            offset += numel
        for rank in range(run.world_size):
            filled = min(max(offset - rank * part, 0), part)
            gradients[rank] += width * (part - filled)  # padding
            states[rank] += g.state_bytes * part + g.holder_bytes if filled else 0
    if accumulates_float32(run):
        if run.strategy == "zero1":
            whole = masters * run.world_size
            return [_moments(parameters, masters, whole + width * run.parameters, s, resident=whole) for s in states]
        gradients = [masters] * run.world_size
    return [_moments(parameters, masters, g, s) for g, s in zip(gradients, states, strict=True)]


def _zero3(run: Run) -> list[dict[str, Held]]:
    """An equal cut of every parameter, padded; in float32 the master copy is a second one. Gradients stay allocated.

    Persistent parameters are whole beside their cuts, as they were gathered after the step before, padding included. On
    one rank nothing is gathered: the cut is the parameter.
    """
    width = BF16 if run.precision == "bf16" else FP32
    whole, states = 0, [0] * run.world_size
    for g in run.groups:
        parts = [math.ceil(run.numel(n) / run.world_size) for n in g.parameters]
        whole += sum(parts)
        holders = max(math.ceil(run.numel(n) / part) for n, part in zip(g.parameters, parts, strict=True))
        for rank in range(holders):  # the ranks that hold any of this group, padding aside
            states[rank] += g.state_bytes * sum(parts) + g.holder_bytes
    bucket = width * reduce_bucket(run)
    gradients = (FP32 if accumulates_float32(run) else width) * whole
    ranks = [_moments(width * whole, FP32 * whole, gradients, s, gradients, bucket) for s in states]
    if run.world_size > 1:
        numels = [run.numel(name) for name in persistent_parameters(run)]
        kept = width * sum(math.ceil(numel / run.world_size) * run.world_size for numel in numels)
        for moments in ranks:
            for moment in MOMENTS[1:]:
                moments[moment]["parameters"] += kept
    return ranks


def accumulates_float32(run: Run) -> bool:
    """Whether DeepSpeed adds up a bf16 model's gradients in float32: `data_types` of its own config file says so."""
    named = run.engine.get("data_types", {}).get("grad_accum_dtype")
    return run.precision == "bf16" and named in ("fp32", "float32", "float", "torch.float32")


def reduce_bucket(run: Run) -> int:
    """Elements of DeepSpeed's reduce bucket: the config file's, or what strategies/zero.py puts in its place."""
    return int(zero_setting(run, "reduce_bucket_size"))


def zero_setting(run: Run, key: str) -> Any:
    """A setting of DeepSpeed's `zero_optimization`, completed as strategies/zero.py completes it."""
    value = run.engine.get("zero_optimization", {}).get(key, "auto")
    return {**DEFAULTS, **replaced_defaults(run.parameters)}[key] if value == "auto" else value


def persistent_parameters(run: Run) -> list[str]:
    """Parameters that ZeRO-3 keeps whole between steps: of at most stage3_param_persistence_threshold elements each,
    and stage3_model_persistence_threshold together (`mark_persistent_parameters` in parameter_offload.py).
    """
    names: list[str] = []
    total = 0
    for name in run.shapes:
        numel = run.numel(name)
        small = numel <= int(zero_setting(run, "stage3_param_persistence_threshold"))
        if small and total + numel <= int(zero_setting(run, "stage3_model_persistence_threshold")):
            names.append(name)
            total += numel
    return names


def most_gathered(run: Run) -> int:
    """Elements that ZeRO-3 has gathered at once at most, beside the persistent ones."""
    limit = int(zero_setting(run, "stage3_max_live_parameters"))
    return min(run.parameters - sum(map(run.numel, persistent_parameters(run))), limit)


def predict_buffers(run: Run) -> dict[str, int]:
    """Communication buffers at the peak of backward, beside those that stay: what for → bytes. Estimates in closed
    form.

    They are upper bounds of what lives at the same time; strategies/ledger/simulate.py runs the engine itself and
    gives the exact moment. DDP has none of its own: its buckets are the gradients.
    """
    width = BF16 if run.precision == "bf16" else FP32
    if run.world_size == 1 and run.strategy != "zero3":
        return {}
    if run.strategy == "fsdp":
        blocks: dict[str, int] = {}
        for name in run.shapes:
            unit = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "root"
            blocks[unit] = blocks.get(unit, 0) + run.numel(name)
        root = blocks.pop("root", 0)
        largest = max(blocks.values(), default=0)
        gathered = 2 * largest if run.engine.get("reshard_after_forward", True) else sum(blocks.values())
        return {
            "gathered parameters (root, block, next block)": width * (root + gathered),
            "a block's gradients before the reduce-scatter": width * largest,
            "reduce-scatter input, float32": FP32 * largest,
        }
    zero = run.engine.get("zero_optimization", {})
    if run.strategy in ("zero1", "zero2"):
        return {"reduce bucket": width * reduce_bucket(run) * (2 if zero.get("overlap_comm") is True else 1)}
    if run.strategy == "zero3":
        return {"gathered parameters": width * most_gathered(run) if run.world_size > 1 else 0}
    return {}
