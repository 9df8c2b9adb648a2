"""What ZeRO-3 holds and sends: an equal cut of every parameter, padded.

Plain Python, no torch. The places named are those in DeepSpeed 0.19.8.
"""

import math
from collections.abc import Sequence

from strategies.layout import Intervals, equal_cuts
from strategies.ledger.exchange import exchange, owners_of
from strategies.ledger.terms import FP32, STATE_MOMENTS, Entry, Group, Modules, Moments, Scenario, entry, moments
from strategies.zero.common import ZeroBooks, deepspeed_live, fill_buckets, reduce_bucket, reduce_width, setting
from strategies.zero.defaults import accumulates_float32
from strategies.zero.gathers import gathers, modules_of


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
                for moment in STATE_MOMENTS[1:]:
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

        limit, filled = reduce_bucket(scenario), fill_buckets(scenario, list(reversed(scenario.shapes)))
        whole = not setting(scenario, "reduce_scatter") and setting(scenario, "contiguous_gradients")
        for collective in ("reduce_scatter", "all_reduce"):
            buckets = [b for b in filled if (whole and scenario.elements(b) <= limit) == (collective == "all_reduce")]
            sent = [name for bucket in buckets for name in bucket]
            numel = scenario.elements(sent)
            payload = numel if collective == "all_reduce" else sum(padded[name] for name in sent)
            payload *= times * reduce_width(scenario)
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


def _cuts(scenario: Scenario, names: Sequence[str]) -> dict[str, Intervals]:
    """These parameters' intervals under ZeRO-3."""
    return {name: equal_cuts(scenario.shapes[name], scenario.world_size) for name in names}


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
