"""What ZeRO-3 holds and sends: an equal cut of every parameter, padded.

Plain Python, no torch. The places named are those in DeepSpeed 0.19.8.
"""

import itertools
import math
from collections.abc import Sequence

from strategies.layout import Intervals, equal_cuts
from strategies.ledger.exchange import exchange, owners_of
from strategies.ledger.terms import (
    FP32,
    STATE_MOMENTS,
    BackwardMoment,
    Entry,
    Group,
    Held,
    Modules,
    Moments,
    Scenario,
    entry,
    host_moments,
    moments,
)
from strategies.zero.common import ZeroBooks, deepspeed_live, fill_buckets, reduce_bucket, reduce_width, setting
from strategies.zero.defaults import accumulation_width
from strategies.zero.gathers import Fetched, gathers, modules_of
from strategies.zero.offload import offloads_optimizer, offloads_parameters
from strategies.zero.settings import ZERO


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
        found, kept = self._held(scenario), 0
        if scenario.world_size > 1:
            numels = [scenario.numel(name) for name in persistent_parameters(scenario)]
            kept = sum(math.ceil(numel / scenario.world_size) * scenario.world_size for numel in numels)
        for each, moment in itertools.product(found, STATE_MOMENTS):
            held = each[moment]
            for category in self._offloaded(scenario):
                held[category] = 0
            held["parameters"] += scenario.compute_bytes * kept if moment != "after prepare" else 0
        return found

    def on_host(self, scenario: Scenario) -> list[Moments]:
        """Cuts in the model's dtype (offload_param). Masters and states, and gradients twice: in a buffer as they are
        added up, and in float32 as the optimizer takes them (offload_optimizer; `partition_grads` in stage3.py).
        """
        offloaded = self._offloaded(scenario)
        if not offloaded:
            return []
        hosts = []
        for held in self._held(scenario):
            after = held["after step"]
            resting = {category: after[category] for category in offloaded if category != "optimizer states"}
            if "gradients" in offloaded:
                resting["gradients"] += after["master parameters"]
            hosts.append(host_moments(resting, 0, after["optimizer states"] if "optimizer states" in offloaded else 0))
        return hosts

    def optimizer_on_host(self, scenario: Scenario) -> bool:
        return offloads_optimizer(scenario.engine)

    def _offloaded(self, scenario: Scenario) -> list[str]:
        """The categories that lie in host memory. (Persistent parameters stay on the device beside their cuts.)"""
        parameters = ["parameters"] if offloads_parameters(scenario.engine) else []
        optimizer = ["master parameters", "gradients", "optimizer states"]
        return parameters + (optimizer if offloads_optimizer(scenario.engine) else [])

    def _held(self, scenario: Scenario) -> list[Moments]:
        """For every rank: all that it holds, wherever, without persistent parameters."""
        width, ranks = scenario.compute_bytes, scenario.world_size
        whole, states = 0, [0] * ranks
        for g in scenario.groups:
            for names in _subgroups(scenario, g):
                parts = [math.ceil(scenario.numel(n) / ranks) for n in names]
                whole += sum(parts)
                holders = max(math.ceil(scenario.numel(n) / part) for n, part in zip(names, parts, strict=True))
                for rank in range(holders):  # the ranks that hold any of this sub-group, padding aside
                    states[rank] += g.state_bytes * sum(parts) + g.holder_bytes
        contiguous = setting(scenario, "contiguous_gradients")
        bucket = reduce_width(scenario) * reduce_bucket(scenario) if contiguous else 0
        gradients = accumulation_width(scenario.precision, scenario.engine) * whole
        return [moments(width * whole, FP32 * whole, gradients, mine, gradients, bucket) for mine in states]

    def owners(self, scenario: Scenario) -> dict[str, int]:
        names = [name for group in scenario.groups for name in group.parameters]
        return owners_of(scenario, _cuts(scenario, names), scenario.world_size)

    def kept_gathered(self, scenario: Scenario) -> int:
        """What the coordinator keeps till the backward pass. A parameter that was gathered alone keeps the padding of
        its buffer; of several it is copied out of theirs (`AllGatherCoalescedHandle.wait`), or with all-reduce remains
        a view of it.
        """
        if scenario.world_size == 1 and not (scenario.host_apart and offloads_parameters(scenario.engine)):
            return 0
        kept = 0
        for call in _gathers(scenario, None):
            if len(call.parameters) == 1:
                kept += _padded(scenario, call.kept)
            elif setting(scenario, "stage3_use_all_reduce_for_fetch_params"):
                kept += _padded(scenario, call.parameters) if call.kept else 0
            elif call.waited:
                kept += scenario.elements(call.kept)
        return scenario.compute_bytes * kept

    def not_predicted(self, scenario: Scenario) -> dict[str, str]:
        lines = super().not_predicted(scenario)
        uncertain = scenario.modules is None or persistent_parameters(scenario)
        if uncertain and scenario.world_size > 1:
            # Where a limit lets go of parameters, the order counts in which modules are called, which is not known; and
            # with parameters that stay whole, what was there in the first pass after the recorded one: what is let go
            # in it is let go for good (`__params_to_release` is cached), and an evaluation before it has let go of all.
            calls = _gathers(scenario, None)
            often = sum(len(call.parameters) for call in calls) - sum(len(call.kept) for call in calls)
            said = scenario.engine.get("zero_optimization", {})
            limits = [key for key in LIMITS if said.get(key) is not None]
            if often and limits:
                lines = {**dict.fromkeys(("parameters", "all_gather", "all_reduce"), ZERO + limits[0]), **lines}
        return lines

    def in_backward(self, scenario: Scenario, passes: Sequence[BackwardMoment]) -> list[Held]:
        """Parameters that stayed since the forward pass are let go as their gradients come; the others are gathered
        again, as many ahead as the prefetch bucket holds. Gradients go by the bucket, which stays.
        """
        kept, width = self.kept_gathered(scenario), scenario.compute_bytes
        stayed = {name for call in _gathers(scenario, None) for name in call.kept}
        ahead = min(2 * int(setting(scenario, "stage3_prefetch_bucket_size")), most_gathered(scenario))
        held, let_go = [], 0
        for moment in passes:
            again = 0
            if scenario.world_size > 1 and not set(moment.at_work) <= stayed:
                again = width * (ahead + scenario.elements(moment.at_work))
            held.append({"communication buffers": again - min(let_go, kept)})
            let_go += width * scenario.elements([name for name in moment.made if name in stayed])
        return held

    def unpacked(self, scenario: Scenario) -> int:
        """The output of a call that gathers several parameters, out of which they are copied one by one as they are
        waited for (`AllGatherCoalescedHandle.wait`).
        """
        if scenario.world_size == 1:
            return 0
        several = [call.parameters for call in _gathers(scenario, None) if len(call.parameters) > 1]
        return scenario.compute_bytes * max((_padded(scenario, names) for names in several), default=0)

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        """Every gather and every reduction is of equal cuts, so of ceil(elements / N) · N elements per parameter.

        Gathers at every micro-batch: see strategies/zero/gathers.py. Persistent parameters stay; they are gathered one
        by one after every step instead (`_post_step` in stage3.py). Gradients are reduce-scattered at every
        micro-batch, bucket by bucket (`__avg_scatter_grads`); with `reduce_scatter: false` all-reduced unpadded.
        """
        width, ranks, times = scenario.compute_bytes, scenario.world_size, scenario.accumulation
        persistent = persistent_parameters(scenario)
        calls = [call.parameters for call in _gathers(scenario, modules)]
        reducing = setting(scenario, "stage3_use_all_reduce_for_fetch_params")
        entries = []
        for collective in ("all_gather", "all_reduce"):
            fetched = [call for call in calls if (len(call) > 1 and reducing) == (collective == "all_reduce")]
            names = [name for call in fetched for name in call] * times
            made = times * len(fetched)
            if collective == "all_gather":
                names, made = names + persistent, made + len(persistent)
            payload = width * _padded(scenario, names)
            entries += entry(ranks, collective, "parameters", made, scenario.elements(names), payload)

        limit, filled = reduce_bucket(scenario), fill_buckets(scenario, list(reversed(scenario.shapes)))
        whole = not setting(scenario, "reduce_scatter") and setting(scenario, "contiguous_gradients")
        for collective in ("reduce_scatter", "all_reduce"):
            buckets = [b for b in filled if (whole and scenario.elements(b) <= limit) == (collective == "all_reduce")]
            sent = [name for bucket in buckets for name in bucket]
            numel = scenario.elements(sent)
            payload = numel if collective == "all_reduce" else _padded(scenario, sent)
            payload *= times * reduce_width(scenario)
            entries += entry(ranks, collective, "gradients", times * len(buckets), times * numel, payload)

        subgroups = [(group, names) for group in scenario.groups for names in _subgroups(scenario, group)]
        entries += exchange(
            scenario,
            rank,
            lambda: _cuts(scenario, [name for _, names in subgroups for name in names]),
            [names for group, names in subgroups if group.whole_matrix],
        )
        if setting(scenario, "enable_sanity_checks"):  # the bucket's length and its numbers, in int64
            numbers = 8 * times * (len(filled) + len(scenario.shapes))
            entries += entry(ranks, "broadcast", "bookkeeping", 2 * times * len(filled), 0, numbers)
        # A norm per sub-group, in float64 (`get_norm_dtype`; float32 on the few devices without it), or where the
        # optimizer is offloaded in float32 (`complete_grad_norm_calculation_for_cpu_offload`); and in fp16 a byte that
        # says whether any rank found an inf or NaN.
        norm, norms = FP32 if offloads_optimizer(scenario.engine) else 8, len(subgroups)
        overflow = int(scenario.precision == "fp16")
        return entries + entry(ranks, "all_reduce", "bookkeeping", norms + overflow, 0, norm * norms + overflow)

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


def _padded(scenario: Scenario, names: Sequence[str]) -> int:
    """Elements of parameters gathered out of equal cuts."""
    ranks = scenario.world_size
    return sum(ranks * math.ceil(scenario.numel(name) / ranks) for name in names)


LIMITS = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
"""Settings that may make ZeRO-3 let go of a parameter between two uses."""


def _gathers(scenario: Scenario, modules: Modules | None) -> tuple[Fetched, ...]:
    """The calls that gather in a micro-batch. modules: in the order in which they are called, if not the scenario's."""
    live, reuse, prefetch = (int(setting(scenario, key)) for key in LIMITS)
    one_by_one = setting(scenario, "stage3_allgather_sequential")
    calls = gathers(
        tuple((name, scenario.numel(name)) for name in scenario.shapes),
        modules or scenario.modules or modules_of(scenario.shapes),
        frozenset(persistent_parameters(scenario)),
        live,
        reuse,
        1 if one_by_one else prefetch,
    )
    if one_by_one:  # DeepSpeed prefetches one element then, which is one parameter
        alone = [(name, call) for call in calls for name in call.parameters]
        return tuple(Fetched((name,), (name,) if name in call.kept else (), True) for name, call in alone)
    return calls


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
