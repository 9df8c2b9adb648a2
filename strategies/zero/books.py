"""What DeepSpeed's ZeRO-1, -2 and -3 hold, send and hide. Plain Python, no torch.

Where DeepSpeed differs from the paper, it is said, with the place in DeepSpeed 0.19.8.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from strategies.layout import Intervals, equal_cuts, flat_partition, flat_partition_size
from strategies.ledger.exchange import exchange, owners_of
from strategies.ledger.terms import (
    BF16,
    FP32,
    MOMENTS,
    Books,
    Entry,
    Group,
    Held,
    Modules,
    Moments,
    Scenario,
    entry,
    moments,
)
from strategies.zero.defaults import DEFAULTS, accumulates_float32, replaced_defaults
from strategies.zero.gathers import gathers, modules_of


class ZeroBooks(Books):
    """What the stages have in common. See strategies.ledger.terms.Books."""

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


class FlatBooks(ZeroBooks):
    """ZeRO-1 and ZeRO-2: whole parameters; one slice of every group's flat buffer of the rest."""

    @property
    def words(self) -> dict[str, str]:  # type: ignore[override]
        two = self.stage == 2
        return {
            "parameters": "whole, in the compute dtype",
            "master parameters": "this rank's slice in float32",
            "gradients": f"what its slice needs, after {'each pass' if two else 'the last'}",
            "waiting": "what its slice needs, after each pass" if two else "whole, till the last pass",
            "optimizer states": "for its slice",
            "activations": "in the compute dtype",
            "buffers": "the reduce bucket",
        }

    def states(self, scenario: Scenario) -> list[Moments]:
        """Whole parameters in the model's dtype; master weights and state for one slice of every group's flat buffer.

        bf16 with float32 accumulation: ZeRO-1 is another class of DeepSpeed's then, BF16_Optimizer, which keeps whole
        float32 gradients, padding included, from the start on, beside a micro-batch's own; ZeRO-2 accumulates its
        slice.
        """
        width = scenario.compute_bytes
        parameters = masters = 0
        gradients, states = [0] * scenario.world_size, [0] * scenario.world_size
        for g in scenario.groups:
            numels = [scenario.numel(n) for n in g.parameters]
            part = flat_partition_size(numels, scenario.world_size)
            parameters += width * part * scenario.world_size
            masters += FP32 * part
            offset = 0
            for numel in numels:
                # A parameter that a boundary cuts keeps its whole gradient alive, on both sides of the boundary.
                for rank in range(offset // part, (offset + numel - 1) // part + 1):
                    gradients[rank] += width * numel
                offset += numel
            for rank in range(scenario.world_size):
                filled = min(max(offset - rank * part, 0), part)
                gradients[rank] += width * (part - filled)  # padding
                states[rank] += g.state_bytes * part + g.holder_bytes if filled else 0
        if self._accumulates_float32(scenario):
            if self.stage == 1:
                whole = masters * scenario.world_size
                own = width * scenario.parameters
                return [moments(parameters, masters, whole + own, mine, resident=whole) for mine in states]
            gradients = [masters] * scenario.world_size
        return [moments(parameters, masters, g, s) for g, s in zip(gradients, states, strict=True)]

    def owners(self, scenario: Scenario) -> dict[str, int]:
        return owners_of(scenario, _flat(scenario), scenario.world_size)

    def waiting(self, scenario: Scenario, moments: Moments, rank: int) -> Held:
        width = scenario.compute_bytes
        if self._accumulates_float32(scenario):
            return {"gradients": moments["after backward"]["gradients"]}
        if self.stage == 2:  # reduced at every micro-batch; zeros for the padding come with the last
            return {"gradients": moments["after backward"]["gradients"] - width * _padding(scenario, rank)}
        # Whole, and the bucket is let go only where the last micro-batch has been reduced.
        return {"gradients": width * scenario.parameters, "communication buffers": self._bucket(scenario)}

    def buffers(self, scenario: Scenario) -> dict[str, int]:
        return {"reduce bucket": self._bucket(scenario)} if scenario.world_size > 1 else {}

    def _bucket(self, scenario: Scenario) -> int:
        overlap = scenario.engine.get("zero_optimization", {}).get("overlap_comm") is True
        return scenario.compute_bytes * reduce_bucket(scenario) * (2 if overlap else 1)

    def at_the_end(self, scenario: Scenario) -> tuple[int, bool]:
        """ZeRO-2: what is sent is a copy of the bucket, its slices end to end (`allreduce_bucket` in stage_1_and_2.py).
        Exact where the bucket holds the whole model.
        """
        if self.stage == 1 or scenario.world_size == 1 or not setting(scenario, "reduce_scatter"):
            return 0, False
        if self._accumulates_float32(scenario):
            return 0, False  # it adds slices to a partition of its own
        bucket = reduce_bucket(scenario)
        return scenario.compute_bytes * bucket, bucket >= scenario.parameters

    def known_traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        """Gradients reduced whole, parameters gathered once a step.

        The paper reduce-scatters. DeepSpeed fills buckets with gradients as they come, and with its default
        `use_multi_rank_bucket_allreduce` all-reduces a bucket's slices of all ranks together, after which every rank
        copies its own (`average_tensor`, `allreduce_and_scatter` in stage_1_and_2.py): 2Ψ instead of Ψ. Without it each
        slice is reduced to the rank that needs it. With `reduce_scatter: false` buckets are all-reduced as they are.
        ZeRO-1 keeps whole gradients and reduces at the last micro-batch; ZeRO-2 has nowhere to keep them and reduces at
        every one (`DeepSpeedEngine.allreduce_gradients`).

        The all-gather is one per group, of its flat buffer with its padding, in the model's dtype
        (`all_gather_into_tensor_dp_groups` in runtime/utils.py); `allgather_bucket_size` has no effect where torch has
        all_gather_into_tensor.
        """
        ranks, groups = scenario.world_size, scenario.groups
        numels = [[scenario.numel(name) for name in group.parameters] for group in groups]
        flat = [ranks * flat_partition_size(each, ranks) for each in numels]  # elements of each buffer, with padding
        bf16_optimizer = self._is_bf16_optimizer(scenario)
        if bf16_optimizer:
            collective, calls, reduced = "all_reduce", _buckets(flat, 500_000_000), sum(flat)
        else:
            (collective, calls), reduced = self._reductions(scenario), scenario.parameters
        times = scenario.accumulation if self.stage == 2 else 1
        payload = times * _reduce_width(scenario) * reduced
        gathered = scenario.compute_bytes * sum(flat)
        entries = entry(ranks, collective, "gradients", times * calls, times * scenario.parameters, payload)
        entries += entry(ranks, "all_gather", "parameters", len(groups), scenario.parameters, gathered)
        matrices = [group.parameters for group in scenario.matrix_groups]
        entries += exchange(scenario, rank, lambda: _flat(scenario), matrices)
        if bf16_optimizer:
            return entries  # it holds whole reduced gradients, so every rank computes the norm for itself
        norms = len(groups) if setting(scenario, "compute_grad_norm") else 0
        checked = scenario.engine.get("bf16", {}).get("check_grad_overflow", True)
        overflow = int(scenario.precision == "bf16" and checked)
        return entries + entry(ranks, "all_reduce", "bookkeeping", norms + overflow, 0, FP32 * norms + overflow)

    def _accumulates_float32(self, scenario: Scenario) -> bool:
        return accumulates_float32(scenario.precision, scenario.engine)

    def _is_bf16_optimizer(self, scenario: Scenario) -> bool:
        """ZeRO-1 in bf16 with float32 accumulation is another class of DeepSpeed, BF16_Optimizer: it all-reduces its
        flat gradients, padding included, after the last backward pass, in buckets of 5e8 elements
        (`buffered_allreduce_fallback`).
        """
        return self.stage == 1 and self._accumulates_float32(scenario)

    def _reductions(self, scenario: Scenario) -> tuple[str, int]:
        """The collective that gradients are reduced with, and its calls to reduce the whole model once."""
        limit = reduce_bucket(scenario)
        order = list(reversed(scenario.shapes))
        if self.stage == 1 and not setting(scenario, "overlap_comm"):
            # It goes through its groups after the last backward pass (`reduce_gradients`).
            order = [name for group in scenario.groups for name in group.parameters]
        filled = _fill(scenario, order)
        if not setting(scenario, "reduce_scatter"):
            return "all_reduce", len(filled)
        together = setting(scenario, "use_multi_rank_bucket_allreduce")
        calls = 0
        for bucket in filled:
            if together and scenario.elements(bucket) <= limit:
                calls += 1
                continue
            slices: dict[int, list[int]] = {}
            for name in bucket:
                for rank, part in enumerate(_flat(scenario)[name]):
                    if part.numel:
                        slices.setdefault(0 if together else rank, []).append(part.numel)
            calls += sum(_buckets(numels, limit) for numels in slices.values())
        return "all_reduce" if together else "reduce", calls

    def volume_in_words(self, scenario: Scenario) -> str:
        when = "every micro-batch" if self.stage == 2 else "a step"
        if setting(scenario, "reduce_scatter") and not setting(scenario, "use_multi_rank_bucket_allreduce"):
            return f"2Ψ: every slice of the gradients is reduced to its rank (Ψ, once {when}), parameters gathered (Ψ)"
        return (
            f"3Ψ, the paper says 2Ψ: DeepSpeed all-reduces gradients (2Ψ, once {when}) and keeps its slice of them "
            "(use_multi_rank_bucket_allreduce, stage_1_and_2.py), then gathers parameters (Ψ)"
        )

    def published(self, psi: int, ranks: int, largest_layer: int) -> dict[str, int]:
        """The ZeRO paper (arXiv 1910.02054, sections 3 and 5): K = 12 bytes of masters and moments are partitioned, in
        stage 2 the 2 bytes of gradients too. nanotron, the Ultra-scale playbook's tool: 2Ψ parameters, 4Ψ float32
        gradients, (4 + 8)Ψ/N of the optimizer. Megatron-LM with its distributed optimizer, which is stage 1: 6 + 12/N.
        """
        said = deepspeed_live(self.stage, psi, largest_layer, ranks) | {"nanotron": 6 * psi + 12 * psi // ranks}
        if self.stage == 1:
            return said | {"ZeRO paper": 4 * psi + 12 * psi // ranks, "Megatron": 6 * psi + 12 * psi // ranks}
        return said | {"ZeRO paper": 2 * psi + 14 * psi // ranks}


class PartitionedBooks(ZeroBooks):
    """ZeRO-3: an equal cut of every parameter, padded."""

    refuses_compile = (
        "compile = True does not go with ZeRO-3: DeepSpeed's hooks on every layer cut what is compiled into pieces "
        "and use up torch's limit of recompilations; use ZeRO-2 or FSDP, or --no-compile"
    )
    words = {
        "parameters": "equal cuts, gathered for use",
        "master parameters": "this rank's cuts in float32",
        "gradients": "its cuts, in a buffer that stays",
        "waiting": "its cuts, in a buffer that stays",
        "optimizer states": "for its cuts",
        "activations": "in the compute dtype",
        "buffers": "the reduce bucket, gathered parameters",
    }

    def states(self, scenario: Scenario) -> list[Moments]:
        """In float32 the master copy is a second one. Gradients stay allocated.

        Persistent parameters are whole beside their cuts, as they were gathered after the step before, padding
        included. On one rank nothing is gathered: the cut is the parameter.
        """
        width, ranks = scenario.compute_bytes, scenario.world_size
        whole, states = 0, [0] * ranks
        for g in scenario.groups:
            parts = [math.ceil(scenario.numel(n) / ranks) for n in g.parameters]
            whole += sum(parts)
            holders = max(math.ceil(scenario.numel(n) / part) for n, part in zip(g.parameters, parts, strict=True))
            for rank in range(holders):  # the ranks that hold any of this group, padding aside
                states[rank] += g.state_bytes * sum(parts) + g.holder_bytes
        bucket = width * reduce_bucket(scenario)
        float32 = accumulates_float32(scenario.precision, scenario.engine)
        gradients = (FP32 if float32 else width) * whole
        found = [moments(width * whole, FP32 * whole, gradients, mine, gradients, bucket) for mine in states]
        if ranks > 1:
            numels = [scenario.numel(name) for name in persistent_parameters(scenario)]
            kept = width * sum(math.ceil(numel / ranks) * ranks for numel in numels)
            for each in found:
                for moment in MOMENTS[1:]:
                    each[moment]["parameters"] += kept
        return found

    def owners(self, scenario: Scenario) -> dict[str, int]:
        names = [name for group in scenario.groups for name in group.parameters]
        return owners_of(scenario, _cuts(scenario, names), scenario.world_size)

    def kept_gathered(self, scenario: Scenario) -> int:
        """All of them, up to stage3_max_live_parameters; above that it depends on the order of modules, and this is an
        upper bound.
        """
        if scenario.world_size == 1:
            return 0
        live = min(most_gathered(scenario), int(setting(scenario, "stage3_max_reuse_distance")))
        return scenario.compute_bytes * live

    def buffers(self, scenario: Scenario) -> dict[str, int]:
        width = scenario.compute_bytes
        return {"gathered parameters": width * most_gathered(scenario) if scenario.world_size > 1 else 0}

    def known_traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        """Every gather and every reduction is of equal cuts, so of ceil(elements / N) · N elements per parameter.

        Gathers at every micro-batch: see strategies/zero/gathers.py. Persistent parameters stay; they are gathered one
        by one after every step instead (`_post_step` in stage3.py). Gradients are reduce-scattered at every
        micro-batch, bucket by bucket (`__avg_scatter_grads`); with `reduce_scatter: false` all-reduced unpadded.
        """
        width, ranks = scenario.compute_bytes, scenario.world_size
        padded = {name: ranks * math.ceil(scenario.numel(name) / ranks) for name in scenario.shapes}
        persistent = persistent_parameters(scenario)
        calls, gathered = gathers(
            tuple((name, scenario.numel(name)) for name in scenario.shapes),
            modules or modules_of(scenario.shapes),
            frozenset(persistent),
            int(setting(scenario, "stage3_max_live_parameters")),
            int(setting(scenario, "stage3_max_reuse_distance")),
            int(setting(scenario, "stage3_prefetch_bucket_size")),
        )
        times = scenario.accumulation
        calls = times * calls + len(persistent)
        numel = times * scenario.elements(gathered) + scenario.elements(persistent)
        payload = times * sum(padded[name] for name in gathered) + sum(padded[name] for name in persistent)
        entries = entry(ranks, "all_gather", "parameters", calls, numel, width * payload)

        limit, filled = reduce_bucket(scenario), _fill(scenario, list(reversed(scenario.shapes)))
        whole = not setting(scenario, "reduce_scatter") and setting(scenario, "contiguous_gradients")
        for collective in ("reduce_scatter", "all_reduce"):
            buckets = [b for b in filled if (whole and scenario.elements(b) <= limit) == (collective == "all_reduce")]
            sent = [name for bucket in buckets for name in bucket]
            numel = scenario.elements(sent)
            payload = numel if collective == "all_reduce" else sum(padded[name] for name in sent)
            payload *= times * _reduce_width(scenario)
            entries += entry(ranks, collective, "gradients", times * len(buckets), times * numel, payload)

        subgroups = [(group, names) for group in scenario.groups for names in _subgroups(scenario, group)]
        entries += exchange(
            scenario,
            rank,
            lambda: _cuts(scenario, [name for _, names in subgroups for name in names]),
            [names for group, names in subgroups if group.whole_matrix],
        )
        # A norm per sub-group, in float64 (`get_norm_dtype`; float32 on the few devices without it).
        return entries + entry(ranks, "all_reduce", "bookkeeping", len(subgroups), 0, 8 * len(subgroups))

    def volume_in_words(self, scenario: Scenario) -> str:
        return (
            "the paper says 3Ψ: DeepSpeed keeps gathered parameters from forward to backward, Ψ less, as far as "
            "stage3_max_live_parameters and stage3_max_reuse_distance (1e9 each by default) allow; it gathers and "
            "reduce-scatters at every micro-batch"
        )

    def hidden_by(self, compute: float, accumulation: int) -> dict[str, float]:
        """It gathers and reduces during all passes; ZeRO-1 and -2 have nothing beside their collectives, since
        overlap_comm is off by default."""
        return {"gradients": compute * 2 / 3, "parameters": compute}

    def published(self, psi: int, ranks: int, largest_layer: int) -> dict[str, int]:
        """The ZeRO paper (arXiv 1910.02054, section 5.3): all 16 bytes are partitioned."""
        return deepspeed_live(3, psi, largest_layer, ranks) | {"ZeRO paper": 16 * psi // ranks}


def setting(scenario: Scenario, key: str) -> Any:
    """A setting of DeepSpeed's `zero_optimization`, completed as strategies/zero/engine.py completes it."""
    value = scenario.engine.get("zero_optimization", {}).get(key, "auto")
    return {**DEFAULTS, **replaced_defaults(scenario.parameters)}[key] if value == "auto" else value


def reduce_bucket(scenario: Scenario) -> int:
    """Elements of DeepSpeed's reduce bucket."""
    return int(setting(scenario, "reduce_bucket_size"))


def persistent_parameters(scenario: Scenario) -> list[str]:
    """Parameters that ZeRO-3 keeps whole between steps: of at most stage3_param_persistence_threshold elements each,
    and stage3_model_persistence_threshold together (`mark_persistent_parameters` in parameter_offload.py).
    """
    names: list[str] = []
    total = 0
    for name in scenario.shapes:
        numel = scenario.numel(name)
        small = numel <= int(setting(scenario, "stage3_param_persistence_threshold"))
        if small and total + numel <= int(setting(scenario, "stage3_model_persistence_threshold")):
            names.append(name)
            total += numel
    return names


def most_gathered(scenario: Scenario) -> int:
    """Elements that ZeRO-3 has gathered at once at most, beside the persistent ones."""
    limit = int(setting(scenario, "stage3_max_live_parameters"))
    return min(scenario.parameters - scenario.elements(persistent_parameters(scenario)), limit)


def _flat(scenario: Scenario) -> dict[str, Intervals]:
    """Every parameter's intervals under ZeRO-1/2, group by group."""
    groups = [tuple((name, scenario.shapes[name]) for name in group.parameters) for group in scenario.groups]
    return _partitions(tuple(groups), scenario.world_size)


@functools.lru_cache(maxsize=4)
def _partitions(groups: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...], world_size: int) -> dict[str, Intervals]:
    return {name: cuts for group in groups for name, cuts in flat_partition(dict(group), world_size).items()}


def _cuts(scenario: Scenario, names: Sequence[str]) -> dict[str, Intervals]:
    """These parameters' intervals under ZeRO-3."""
    return {name: equal_cuts(scenario.shapes[name], scenario.world_size) for name in names}


def _padding(scenario: Scenario, rank: int) -> int:
    """Elements of the padding in this rank's slices of ZeRO-1/2's flat buffers."""
    padding = 0
    for group in scenario.groups:
        numels = [scenario.numel(name) for name in group.parameters]
        part = flat_partition_size(numels, scenario.world_size)
        padding += part - min(max(sum(numels) - rank * part, 0), part)
    return padding


def _reduce_width(scenario: Scenario) -> int:
    """Bytes per element of a gradient on the wire: communication_data_type, else the model's dtype, whatever dtype
    gradients are accumulated in (`DeepSpeedEngine.communication_data_type`).
    """
    named = scenario.engine.get("communication_data_type")
    return (FP32 if named == "fp32" else BF16) if named else scenario.compute_bytes


def _buckets(numels: Sequence[int], limit: int) -> int:
    """Buckets that are sent off once they hold more than `limit` elements (`allreduce_no_retain`)."""
    buckets, filled = 0, 0
    for numel in numels:
        filled += numel
        if filled > limit:
            buckets, filled = buckets + 1, 0
    return buckets + (filled > 0)


def _fill(scenario: Scenario, order: Sequence[str]) -> list[list[str]]:
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


def _subgroups(scenario: Scenario, group: Group) -> list[tuple[str, ...]]:
    """ZeRO-3 updates a group in pieces of at least sub_group_size elements of a rank's partition
    (`_create_fp16_sub_groups` in stage3.py).
    """
    pieces: list[tuple[str, ...]] = []
    piece: list[str] = []
    filled = 0
    for name in group.parameters:
        piece.append(name)
        filled += math.ceil(scenario.numel(name) / scenario.world_size)
        if filled >= int(setting(scenario, "sub_group_size")):
            pieces.append(tuple(piece))
            piece, filled = [], 0
    return [*pieces, tuple(piece)] if piece else pieces


def books(name: str) -> Books:
    """For strategies.catalogue."""
    stage = int(name.removeprefix("zero"))
    return PartitionedBooks(stage) if stage == 3 else FlatBooks(stage)
