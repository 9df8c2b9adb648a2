"""Predicted traffic: what every rank sends in one optimizer step, by collective, from shapes and settings alone.

Plain Python, no torch. Nothing here has seen a live tensor or the meter (strategies/ledger/wire.py), whose definitions
of payload and ring bytes it shares. A *step* here is one in the middle of a run: first steps send a little more (DDP
agrees on its buckets, DeepSpeed records the order of modules and compares it between ranks), evaluations are not
counted, and neither is the loss that the training loop averages.

What each library sends is stated where it is computed, with the place in its source: torch 2.13, DeepSpeed 0.19.8.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from strategies.layout import (
    Intervals,
    equal_cuts,
    flat_partition,
    flat_partition_size,
    on_rank,
    row_blocks,
)
from strategies.ledger.predict import BF16, FP32, Group, Run, accumulates_float32, persistent_parameters, zero_setting
from strategies.ledger.zero3_gathers import Modules, gathers, modules_of
from strategies.owners import Matrix, assign_owners, rounds

Names = Sequence[str]

PURPOSES = ("gradients", "parameters", "updates", "bookkeeping")
"""Reduced gradients; gathered parameters; Muon's matrices and their updates; norms, flags, barriers."""


@dataclass(frozen=True)
class Entry:
    """One line of the traffic of a rank in one step.

    elements: of the model, before padding; payload_bytes and ring_bytes as defined in strategies/ledger/wire.py.
    """

    collective: str
    purpose: str
    calls: int
    elements: int
    payload_bytes: int
    ring_bytes: float


def ring_bytes(collective: str, payload_bytes: int, world_size: int) -> float:
    """Bytes that a rank puts on the wire of a ring, on average over the ranks (Patarasu and Yuan, 2009)."""
    share = (world_size - 1) / world_size
    factor = {
        "all_reduce": 2 * share,
        "all_gather": share,
        "reduce_scatter": share,
        "broadcast": share,
        "reduce": share,
    }
    return payload_bytes * factor.get(collective, 1.0)


def predict_traffic(run: Run, rank: int = 0, modules: Modules | None = None) -> list[Entry]:
    """What `rank` sends in one step. Nothing on one rank.

    modules: of the model, as in strategies/ledger/zero3_gathers.py; by default those that the names tell of. They only
    matter to ZeRO-3, and only where a limit makes it let go of parameters between two uses.

    Raises ValueError for a DeepSpeed setting whose traffic is not known here.
    """
    if run.world_size == 1 or run.strategy == "single":
        return []
    if run.strategy == "ddp":
        return _ddp(run)
    if run.strategy == "fsdp":
        return _fsdp(run, rank)
    _check_zero(run)
    return _zero3(run, rank, modules or modules_of(run.shapes)) if run.strategy == "zero3" else _zero12(run, rank)


def paper_volumes(entries: Sequence[Entry], parameters: int) -> dict[str, float]:
    """Purpose → elements sent, in multiples of Ψ, as the ZeRO paper counts (section 7: an all-reduce is a
    reduce-scatter and an all-gather, so 2Ψ; everything else Ψ). Before padding, without bookkeeping; "total" last.
    """
    volumes: dict[str, float] = {}
    for entry in entries:
        if entry.purpose != "bookkeeping":
            weight = 2 if entry.collective == "all_reduce" else 1
            volumes[entry.purpose] = volumes.get(entry.purpose, 0.0) + weight * entry.elements / parameters
    return {**volumes, "total": sum(volumes.values())}


def explain_volume(run: Run) -> str:
    """One line for a table: why this strategy sends what it sends, and not what the ZeRO paper says."""
    if run.strategy == "ddp":
        muon = any(group.whole_matrix for group in run.groups)
        same = " (Muon's share as reduce-scatter and all-gather: the same)" if muon else ""
        return f"2Ψ: an all-reduce of gradients, once a step{same}"
    if run.strategy == "fsdp":
        gathered = (
            "gathered in forward and again in backward" if run.engine["reshard_after_forward"] else "gathered once"
        )
        return (
            f"blocks are {gathered} for every micro-batch, what no block holds once; gradients are reduce-scattered "
            "once a step (torch FSDP2)"
        )
    if run.strategy in ("zero1", "zero2"):
        when = "every micro-batch" if run.strategy == "zero2" else "a step"
        if zero_setting(run, "reduce_scatter") and not zero_setting(run, "use_multi_rank_bucket_allreduce"):
            return f"2Ψ: every slice of the gradients is reduced to its rank (Ψ, once {when}), parameters gathered (Ψ)"
        return (
            f"3Ψ, the paper says 2Ψ: DeepSpeed all-reduces gradients (2Ψ, once {when}) and keeps its slice of them "
            "(use_multi_rank_bucket_allreduce, stage_1_and_2.py), then gathers parameters (Ψ)"
        )
    return (
        "the paper says 3Ψ: DeepSpeed keeps gathered parameters from forward to backward, Ψ less, as far as "
        "stage3_max_live_parameters and stage3_max_reuse_distance (1e9 each by default) allow; it gathers and "
        "reduce-scatters at every micro-batch"
    )


def _entry(run: Run, collective: str, purpose: str, calls: int, elements: int, payload: int) -> list[Entry]:
    """A line, or none where nothing is called."""
    if not calls:
        return []
    return [Entry(collective, purpose, calls, elements, payload, ring_bytes(collective, payload, run.world_size))]


def _elements(run: Run, names: Names) -> int:
    return sum(run.numel(name) for name in names)


# DDP


def _ddp(run: Run) -> list[Entry]:
    """An all-reduce of all gradients that AdamW uses, in float32 (autocast casts weights, not gradients), at the last
    micro-batch (`no_sync` before). A tied weight is one parameter and so goes once.

    Muon's matrices are outside of DDP's buckets: one reduce-scatter per round of owners; and the updates back, by
    all-gather where all owners have as much in a round, else by a broadcast per owner.
    """
    owned = {name: run.shapes[name] for group in _whole_matrix(run) for name in group.parameters}
    rest = [name for name in run.shapes if name not in owned]
    entries = _entry(
        run,
        "all_reduce",
        "gradients",
        _ddp_buckets([FP32 * run.numel(name) for name in reversed(rest)]),
        _elements(run, rest),
        FP32 * _elements(run, rest),
    )
    owners = assign_owners(owned, run.world_size)
    matrices = {
        name: Matrix(name, shape, on_rank(shape, owners[name], run.world_size), owners[name])
        for name, shape in owned.items()
    }
    numel = _elements(run, list(owned))
    calls = len(rounds(matrices.values(), run.world_size))
    entries += _entry(run, "reduce_scatter", "updates", calls, numel, FP32 * numel)
    gathered = [0, 0]  # calls, elements
    broadcast = [0, 0]
    for group in _whole_matrix(run):
        for turn in rounds((matrices[name] for name in group.parameters), run.world_size):
            sizes = [sum(matrix.numel for matrix in theirs) for theirs in turn]
            together = len(set(sizes)) == 1
            line = gathered if together else broadcast
            line[0] += 1 if together else sum(size > 0 for size in sizes)
            line[1] += sum(sizes)
    for collective, (calls, numel) in (("all_gather", gathered), ("broadcast", broadcast)):
        entries += _entry(run, collective, "updates", calls, numel, FP32 * numel)
    return entries + _entry(run, "all_reduce", "bookkeeping", 1 if owned else 0, 0, FP32)  # the global norm


def _ddp_buckets(sizes: Sequence[int]) -> int:
    """Buckets that DDP's reducer makes of gradients of these bytes, in the order in which backward produces them.

    A bucket is closed once it holds its limit, 1 MiB for the first and 25 MiB for the others (bucket_cap_mb;
    `compute_bucket_assignment_by_size` in reducer.cpp). The real order is that of the first backward pass; here it is
    the reverse of the names.
    """
    buckets, held = 0, 0
    for size in sizes:
        held += size
        if held >= (1 if buckets == 0 else 25) * 2**20:
            buckets, held = buckets + 1, 0
    return buckets + (held > 0)


# FSDP2


def _fsdp(run: Run, rank: int) -> list[Entry]:
    """One all-gather per wrapped module and one for the root, of blocks of ceil(rows / N) rows: rows that do not divide
    make the gathered tensor longer than the parameters. In forward, and for resharded modules again in backward, at
    every micro-batch, in the compute dtype; backward lets go of all of them (`FSDPParamGroup.post_backward`).

    One reduce-scatter per module at the last micro-batch (`set_requires_gradient_sync`), float32 by our policy.
    """
    width = BF16 if run.precision == "bf16" else FP32
    units: dict[str, list[str]] = {}
    for name in run.shapes:
        units.setdefault(_block_of(name) if run.engine["wrap"] else "", []).append(name)
    times_gathered = {
        unit: 2 if unit and run.engine["reshard_after_forward"] else 1 for unit in units
    }  # the root has no name
    padded = {
        unit: run.world_size
        * sum(math.ceil(run.shapes[n][0] / run.world_size) * math.prod(run.shapes[n][1:]) for n in names)
        for unit, names in units.items()
    }
    times = run.accumulation
    return [
        *_entry(
            run,
            "all_gather",
            "parameters",
            times * sum(times_gathered.values()),
            times * sum(times_gathered[unit] * _elements(run, names) for unit, names in units.items()),
            times * sum(times_gathered[unit] * width * padded[unit] for unit in units),
        ),
        *_entry(run, "reduce_scatter", "gradients", len(units), run.parameters, FP32 * sum(padded.values())),
        *_exchange(
            run,
            rank,
            lambda: {name: row_blocks(shape, run.world_size) for name, shape in run.shapes.items()},
            [group.parameters for group in _whole_matrix(run)],
        ),
        *_entry(run, "all_reduce", "bookkeeping", 1, 0, FP32),  # the global norm
    ]


def _block_of(name: str) -> str:
    """The item of a module list that a parameter belongs to ("blocks.3"), or "" where it belongs to none."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else ""


# DeepSpeed

ZERO_UNKNOWN = {
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


def _check_zero(run: Run) -> None:
    zero = run.engine.get("zero_optimization", {})
    for key, harmless in ZERO_UNKNOWN.items():
        if zero.get(key, "auto") not in ("auto", None, harmless):
            raise ValueError(
                f"zero_optimization.{key}: {zero[key]!r} changes what DeepSpeed sends in a way that is not predicted; "
                f"remove it, or write {harmless!r}."
            )


def _reduce_width(run: Run) -> int:
    """Bytes per element of a gradient on the wire: communication_data_type, else the model's dtype, whatever dtype
    gradients are accumulated in (`DeepSpeedEngine.communication_data_type`).
    """
    named = run.engine.get("communication_data_type")
    return (FP32 if named == "fp32" else BF16) if named else (BF16 if run.precision == "bf16" else FP32)


def _zero12(run: Run, rank: int) -> list[Entry]:
    """ZeRO-1 and ZeRO-2: gradients reduced whole, parameters gathered once a step.

    The paper reduce-scatters. DeepSpeed fills buckets with gradients as they come, and with its default
    `use_multi_rank_bucket_allreduce` all-reduces a bucket's slices of all ranks together, after which every rank copies
    its own (`average_tensor`, `allreduce_and_scatter` in stage_1_and_2.py): 2Ψ in place of Ψ. Without it each slice is
    reduced to the rank that needs it. With `reduce_scatter: false` buckets are all-reduced as they are. ZeRO-1 keeps
    whole gradients and reduces at the last micro-batch; ZeRO-2 has nowhere to keep them and reduces at every one
    (`DeepSpeedEngine.allreduce_gradients`).

    The all-gather is one per group, of its flat buffer with its padding, in the model's dtype
    (`all_gather_into_tensor_dp_groups` in runtime/utils.py); `allgather_bucket_size` has no effect where torch has
    all_gather_into_tensor.
    """
    width = BF16 if run.precision == "bf16" else FP32
    parts = [flat_partition_size([run.numel(name) for name in g.parameters], run.world_size) for g in run.groups]
    flat = [run.world_size * part for part in parts]  # elements of each group's buffer, with padding

    @functools.cache
    def held() -> dict[str, Intervals]:
        shapes = [{name: run.shapes[name] for name in group.parameters} for group in run.groups]
        return {name: cuts for group in shapes for name, cuts in flat_partition(group, run.world_size).items()}

    bf16_optimizer = _bf16_optimizer(run)
    if bf16_optimizer:
        collective, calls, reduced = "all_reduce", _buckets(flat, 500_000_000), sum(flat)
    else:
        (collective, calls), reduced = _reductions(run, held), run.parameters
    times = run.accumulation if run.strategy == "zero2" else 1
    payload = times * _reduce_width(run) * reduced
    entries = _entry(run, collective, "gradients", times * calls, times * run.parameters, payload)
    entries += _entry(run, "all_gather", "parameters", len(run.groups), run.parameters, width * sum(flat))
    entries += _exchange(run, rank, held, [group.parameters for group in _whole_matrix(run)])
    if bf16_optimizer:
        return entries  # it holds whole reduced gradients, so every rank computes the norm for itself
    norms = len(run.groups) if zero_setting(run, "compute_grad_norm") else 0
    overflow = int(run.precision == "bf16" and run.engine.get("bf16", {}).get("check_grad_overflow", True))
    return entries + _entry(run, "all_reduce", "bookkeeping", norms + overflow, 0, FP32 * norms + overflow)


def _bf16_optimizer(run: Run) -> bool:
    """ZeRO-1 in bf16 with float32 accumulation is another class of DeepSpeed, BF16_Optimizer: it all-reduces its flat
    gradients, padding included, after the last backward pass, in buckets of 5e8 elements
    (`buffered_allreduce_fallback`).
    """
    return run.strategy == "zero1" and accumulates_float32(run)


def _buckets(numels: Sequence[int], limit: int) -> int:
    """Buckets that are sent off once they hold more than `limit` elements (`allreduce_no_retain`)."""
    buckets, held = 0, 0
    for numel in numels:
        held += numel
        if held > limit:
            buckets, held = buckets + 1, 0
    return buckets + (held > 0)


def _fill(run: Run) -> list[list[str]]:
    """DeepSpeed's gradient buckets (`reduce_independent_p_g_buckets_and_remove_grads`): full before a gradient that
    would exceed reduce_bucket_size; a larger gradient goes alone.

    Filled in the order in which backward produces gradients, here the reverse of the names; but ZeRO-1 goes through its
    groups after the last backward pass, unless it is to overlap them (`reduce_gradients`).
    """
    limit = int(zero_setting(run, "reduce_bucket_size"))
    buckets: list[list[str]] = []
    held = 0
    order = list(reversed(run.shapes))
    if run.strategy == "zero1" and not zero_setting(run, "overlap_comm"):
        order = [name for group in run.groups for name in group.parameters]
    for name in order:
        if not buckets or held + run.numel(name) > limit:
            buckets.append([])
            held = 0
        buckets[-1].append(name)
        held += run.numel(name)
    return buckets


def _reductions(run: Run, held: Callable[[], dict[str, Intervals]]) -> tuple[str, int]:
    """The collective that ZeRO-1/2 reduce gradients with, and its calls to reduce the whole model once."""
    limit = int(zero_setting(run, "reduce_bucket_size"))
    buckets = _fill(run)
    if not zero_setting(run, "reduce_scatter"):
        return "all_reduce", len(buckets)
    together = zero_setting(run, "use_multi_rank_bucket_allreduce")
    calls = 0
    for bucket in buckets:
        if together and _elements(run, bucket) <= limit:
            calls += 1
            continue
        slices: dict[int, list[int]] = {}
        for name in bucket:
            for rank, part in enumerate(held()[name]):
                if part.numel:
                    slices.setdefault(0 if together else rank, []).append(part.numel)
        calls += sum(_buckets(numels, limit) for numels in slices.values())
    return "all_reduce" if together else "reduce", calls


def _zero3(run: Run, rank: int, modules: Modules) -> list[Entry]:
    """ZeRO-3: every gather and every reduction is of equal cuts, so of ceil(elements / N) · N elements per parameter.

    Gathers at every micro-batch: see strategies/ledger/zero3_gathers.py. Persistent parameters stay; they are gathered
    one by one after every step instead (`_post_step` in stage3.py). Gradients are reduce-scattered at every
    micro-batch, bucket by bucket (`__avg_scatter_grads`); with `reduce_scatter: false` all-reduced unpadded.
    """
    width = BF16 if run.precision == "bf16" else FP32
    padded = {name: run.world_size * math.ceil(run.numel(name) / run.world_size) for name in run.shapes}
    persistent = persistent_parameters(run)
    calls, gathered = gathers(
        tuple((name, run.numel(name)) for name in run.shapes),
        modules,
        frozenset(persistent),
        int(zero_setting(run, "stage3_max_live_parameters")),
        int(zero_setting(run, "stage3_max_reuse_distance")),
        int(zero_setting(run, "stage3_prefetch_bucket_size")),
    )
    times = run.accumulation
    calls, numel, payload = (
        times * calls + len(persistent),
        times * _elements(run, gathered) + _elements(run, persistent),
        width * (times * sum(padded[name] for name in gathered) + sum(padded[name] for name in persistent)),
    )
    entries = _entry(run, "all_gather", "parameters", calls, numel, payload)

    limit = int(zero_setting(run, "reduce_bucket_size"))
    whole = not zero_setting(run, "reduce_scatter") and zero_setting(run, "contiguous_gradients")
    for collective in ("reduce_scatter", "all_reduce"):
        buckets = [b for b in _fill(run) if (whole and _elements(run, b) <= limit) == (collective == "all_reduce")]
        sent = [name for bucket in buckets for name in bucket]
        numel = _elements(run, sent)
        payload = numel if collective == "all_reduce" else sum(padded[name] for name in sent)
        entries += _entry(
            run,
            collective,
            "gradients",
            times * len(buckets),
            times * numel,
            times * _reduce_width(run) * payload,
        )

    subgroups = [(group, names) for group in run.groups for names in _subgroups(run, group)]
    entries += _exchange(
        run,
        rank,
        lambda: {name: equal_cuts(run.shapes[name], run.world_size) for _, names in subgroups for name in names},
        [names for group, names in subgroups if group.whole_matrix],
    )
    # A norm per sub-group, in float64 (`get_norm_dtype`; float32 on the few devices without it).
    return entries + _entry(run, "all_reduce", "bookkeeping", len(subgroups), 0, 8 * len(subgroups))


def _subgroups(run: Run, group: Group) -> list[tuple[str, ...]]:
    """ZeRO-3 updates a group in pieces of at least sub_group_size elements of a rank's partition
    (`_create_fp16_sub_groups` in stage3.py).
    """
    pieces: list[tuple[str, ...]] = []
    piece: list[str] = []
    held = 0
    for name in group.parameters:
        piece.append(name)
        held += math.ceil(run.numel(name) / run.world_size)
        if held >= int(zero_setting(run, "sub_group_size")):
            pieces.append(tuple(piece))
            piece, held = [], 0
    return [*pieces, tuple(piece)] if piece else pieces


# Muon's exchange under FSDP and ZeRO


def _whole_matrix(run: Run) -> list[Group]:
    return [group for group in run.groups if group.whole_matrix]


def _exchange(run: Run, rank: int, held: Callable[[], dict[str, Intervals]], together: Sequence[Names]) -> list[Entry]:
    """Two all-to-alls per round of owners, always float32: the pieces of gradients in, the pieces of updates back
    (strategies/matrices.py). A matrix that lies whole on its owner is not sent at all.

    held: gives every parameter's intervals in the optimizer's order; together: matrices that share rounds.
    """
    if not together:
        return []
    # Under whatever rule: owners even out the load over all that is two-dimensional.
    intervals = {name: cuts for name, cuts in held().items() if len(run.shapes[name]) == 2}
    owners = assign_owners({name: run.shapes[name] for name in intervals}, run.world_size, intervals)
    calls = elements = 0
    for names in together:
        matrices = [Matrix(name, run.shapes[name], intervals[name], owners[name]) for name in names]
        turns = rounds((matrix for matrix in matrices if not matrix.in_one_piece), run.world_size)
        calls += 2 * len(turns)
        for matrix in (matrix for turn in turns for theirs in turn for matrix in theirs):
            here = matrix.held[rank].numel
            elements += matrix.numel - here if matrix.owner == rank else here
    return _entry(run, "all_to_all", "updates", calls, elements, FP32 * elements)
