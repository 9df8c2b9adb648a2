"""What ZeRO-1 and ZeRO-2 hold and send: whole parameters; one slice of every group's flat buffer of the rest.

Plain Python, no torch. The places named are those in DeepSpeed 0.19.8.
"""

import functools
from collections.abc import Sequence

from strategies.layout import Intervals, flat_partition, flat_partition_size, flat_starts
from strategies.ledger.exchange import exchange, owners_of
from strategies.ledger.terms import (
    FP32,
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
from strategies.zero.common import (
    ZeroBooks,
    closed_buckets,
    deepspeed_live,
    fill_buckets,
    reduce_bucket,
    reduce_width,
    setting,
)
from strategies.zero.defaults import accumulates_float32, alignment, is_bf16_optimizer
from strategies.zero.offload import offloads_optimizer


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
        slice. ZeRO-1 in fp16, of the usual class, adds them up whole in float32 beside each parameter (`grad_accum`),
        and after the last pass its slice of their average is one more buffer; what it does not need is not let go.
        """
        if offloads_optimizer(scenario.engine):
            # Gradients go to the host as soon as they are reduced.
            parameters = scenario.compute_bytes * sum(self._slices(scenario)) * scenario.world_size
            buffers = scenario.compute_bytes * _largest(scenario)
            return [moments(parameters, 0, 0, 0, buffers=buffers) for _ in range(scenario.world_size)]
        return [held for held, _ in self._held(scenario)]

    def on_host(self, scenario: Scenario) -> list[Moments]:
        """Masters, their gradients in float32 and the states, of this rank's slice. In the model's dtype, a buffer for
        the largest gradient and one for its slice of parameters (`temp_grad_buffer_for_cpu_offload` and
        `param_buffer_of_bit16_for_cpu_offload_groups` in stage_1_and_2.py); and ZeRO-2's sums of several micro-batches,
        whole for every parameter that the slice touches (`accumulated_grads_in_cpu`).
        """
        if not offloads_optimizer(scenario.engine):
            return []
        width, part = scenario.compute_bytes, sum(self._slices(scenario))
        held = []
        for ours, touched in self._held(scenario):
            resting = {
                "master parameters": FP32 * part,
                "gradients": FP32 * part,
                "communication buffers": width * (_largest(scenario) + part),
            }
            found = host_moments(resting, 0, ours["after step"]["optimizer states"])
            if self.stage == 2 and scenario.accumulation > 1:  # they come with the first step and stay
                for moment in found:
                    found[moment]["gradients"] += width * touched if moment != "after prepare" else 0
            held.append(found)
        return held

    def optimizer_on_host(self, scenario: Scenario) -> bool:
        return offloads_optimizer(scenario.engine)

    def _slices(self, scenario: Scenario) -> list[int]:
        """Elements of a rank's slice of every group, padding included."""
        numels = [[scenario.numel(name) for name in group.parameters] for group in scenario.groups]
        return [flat_partition_size(each, scenario.world_size, self._align(scenario)) for each in numels]

    def _held(self, scenario: Scenario) -> list[tuple[Moments, int]]:
        """For every rank: all that it holds, wherever; and elements of the parameters that its slices touch."""
        width, ranks = scenario.compute_bytes, scenario.world_size
        align = self._align(scenario)
        parameters = masters = 0
        touched, gradients, states = [0] * ranks, [0] * ranks, [0] * ranks
        for g in scenario.groups:
            numels = [scenario.numel(n) for n in self._order(scenario, g)]
            part = flat_partition_size(numels, ranks, align)
            parameters += width * part * ranks
            masters += FP32 * part
            filled = [0] * ranks
            for numel, start in zip(numels, flat_starts(numels, align), strict=False):
                # A parameter that a boundary cuts keeps its whole gradient alive, on both sides of the boundary.
                for rank in range(start // part, (start + numel - 1) // part + 1):
                    gradients[rank] += width * numel
                    touched[rank] += numel
                    filled[rank] += min((rank + 1) * part, start + numel) - max(rank * part, start)
            for rank in range(ranks):
                gradients[rank] += width * (part - filled[rank])  # padding
                states[rank] += g.state_bytes * part + g.holder_bytes if filled[rank] else 0
        if self._accumulates_float32(scenario):
            if self._is_bf16_optimizer(scenario):
                whole = masters * scenario.world_size
                own = width * scenario.parameters
                found = [moments(parameters, masters, whole + own, mine, resident=whole) for mine in states]
                return list(zip(found, touched, strict=True))
            beside = FP32 * scenario.parameters if self.stage == 1 else 0
            gradients = [beside + masters] * scenario.world_size
        found = [moments(parameters, masters, g, s) for g, s in zip(gradients, states, strict=True)]
        return list(zip(found, touched, strict=True))

    def owners(self, scenario: Scenario) -> dict[str, int]:
        return owners_of(scenario, self._flat(scenario), scenario.world_size)

    def waiting(self, scenario: Scenario, moments: Moments, rank: int) -> Held:
        width, offloads = self._bucket_width(scenario), offloads_optimizer(scenario.engine)
        sums = self._accumulates_float32(scenario) or offloads
        if self._is_bf16_optimizer(scenario) or (self.stage == 2 and sums):
            return {"gradients": moments["after backward"]["gradients"]}
        if self.stage == 2:  # reduced at every micro-batch; zeros for the padding come with the last
            return {"gradients": moments["after backward"]["gradients"] - width * self._padding(scenario, rank)}
        # Whole, and the bucket is let go only where the last micro-batch has been reduced.
        resting = moments["after step"]["communication buffers"]
        return {"gradients": width * scenario.parameters, "communication buffers": resting + self._bucket(scenario)}

    def in_backward(self, scenario: Scenario, passes: Sequence[BackwardMoment]) -> list[Held]:
        """ZeRO-1 keeps whole gradients till all are there. ZeRO-2 copies them into its bucket, and what its slice needs
        of a full bucket stays: here that of the rank whose slice comes first.
        """
        bucket, made = self._bucket(scenario) if scenario.world_size > 1 else 0, [moment.made for moment in passes]
        beside, width = {"communication buffers": bucket}, scenario.compute_bytes
        if self._is_bf16_optimizer(scenario):
            beside = {}
        elif scenario.accumulation > 1 or self._accumulates_float32(scenario) or offloads_optimizer(scenario.engine):
            return [beside if self.stage == 2 or scenario.accumulation == 1 else {} for _ in passes]
        elif self.stage == 2 and bucket:
            limit, part = reduce_bucket(scenario), sum(self._slices(scenario))
            kept = [min(max(0, elements - limit), part) for elements in scenario.so_far(made)]
            return [{**beside, "gradients": width * elements} for elements in kept]
        return [{**beside, "gradients": width * elements} for elements in scenario.so_far(made)]

    def _bucket(self, scenario: Scenario) -> int:
        if not setting(scenario, "contiguous_gradients"):
            return 0
        overlap = 2 if setting(scenario, "overlap_comm") else 1
        return self._bucket_width(scenario) * reduce_bucket(scenario) * overlap

    def _bucket_width(self, scenario: Scenario) -> int:
        """Bytes of an element of the reduce bucket (`_gradient_reduction_buffer_dtype` in stage_1_and_2.py)."""
        beside = self.stage == 1 and self._accumulates_float32(scenario) and not self._is_bf16_optimizer(scenario)
        return FP32 if beside else scenario.compute_bytes

    def at_the_end(self, scenario: Scenario) -> int:
        """ZeRO-2 sends a copy of its bucket, slices end to end (`allreduce_bucket` in stage_1_and_2.py)."""
        if self.stage == 1 or scenario.world_size == 1 or not setting(scenario, "reduce_scatter"):
            return 0
        if self._accumulates_float32(scenario):
            return 0  # it adds slices to a partition of its own
        return scenario.compute_bytes * reduce_bucket(scenario)

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
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
        align, numels = self._align(scenario), [[scenario.numel(n) for n in self._order(scenario, g)] for g in groups]
        flat = [ranks * flat_partition_size(each, ranks, align) for each in numels]  # with padding
        bf16_optimizer = self._is_bf16_optimizer(scenario)
        if bf16_optimizer:
            collective, calls, reduced = "all_reduce", closed_buckets(flat, 500_000_000), sum(flat)
        else:
            (collective, calls), reduced = self._reductions(scenario), scenario.parameters
        times = scenario.accumulation if self.stage == 2 else 1
        payload = times * reduce_width(scenario) * reduced
        gathered = scenario.compute_bytes * sum(flat)
        entries = entry(ranks, collective, "gradients", times * calls, times * scenario.parameters, payload)
        entries += entry(ranks, "all_gather", "parameters", len(groups), scenario.parameters, gathered)
        matrices = [self._order(scenario, group) for group in scenario.matrix_groups]
        entries += exchange(scenario, rank, lambda: self._flat(scenario), matrices)
        if bf16_optimizer:
            return entries  # it holds whole reduced gradients, so every rank computes the norm for itself
        norms = len(groups) if setting(scenario, "compute_grad_norm") else 0
        # A byte that says whether any rank found an inf or NaN: always in fp16, as the config says in bf16.
        checked = scenario.engine.get("bf16", {}).get("check_grad_overflow", True)
        overflow = int(scenario.precision == "fp16" or (scenario.precision == "bf16" and checked))
        return entries + entry(ranks, "all_reduce", "bookkeeping", norms + overflow, 0, FP32 * norms + overflow)

    def _order(self, scenario: Scenario, group: Group) -> tuple[str, ...]:
        """A group's parameters as they lie in its flat buffer: with `round_robin_gradients` dealt out, those of the
        first deal first (`_round_robin_reorder`).
        """
        if not setting(scenario, "round_robin_gradients") or self._is_bf16_optimizer(scenario):
            return group.parameters
        ranks = scenario.world_size
        return tuple(name for deal in range(ranks) for name in group.parameters[deal::ranks])

    def _align(self, scenario: Scenario) -> int:
        """Elements at a multiple of which every parameter begins."""
        return 1 if self._is_bf16_optimizer(scenario) else alignment(scenario.precision, scenario.engine)

    def _flat(self, scenario: Scenario) -> dict[str, Intervals]:
        """Every parameter's intervals, group by group."""
        orders = (self._order(scenario, group) for group in scenario.groups)
        groups = tuple(tuple((name, scenario.shapes[name]) for name in order) for order in orders)
        return _partitions(groups, scenario.world_size, self._align(scenario))

    def _padding(self, scenario: Scenario, rank: int) -> int:
        """Elements of the padding in this rank's slices of the flat buffers."""
        held, padding = self._flat(scenario), 0
        for group in scenario.groups:
            numels = [scenario.numel(name) for name in self._order(scenario, group)]
            padding += flat_partition_size(numels, scenario.world_size, self._align(scenario))
            padding -= sum(held[name][rank].numel for name in group.parameters)
        return padding

    def _accumulates_float32(self, scenario: Scenario) -> bool:
        return accumulates_float32(scenario.precision, scenario.engine)

    def _is_bf16_optimizer(self, scenario: Scenario) -> bool:
        """ZeRO-1 in bf16 with float32 accumulation is another class of DeepSpeed, BF16_Optimizer: it all-reduces its
        flat gradients, padding included, after the last backward pass, in buckets of 5e8 elements
        (`buffered_allreduce_fallback`).
        """
        return is_bf16_optimizer(self.stage, scenario.precision, scenario.engine)

    def _reductions(self, scenario: Scenario) -> tuple[str, int]:
        """The collective that gradients are reduced with, and its calls to reduce the whole model once."""
        limit = reduce_bucket(scenario)
        order = list(reversed(scenario.shapes))
        if self.stage == 1 and not setting(scenario, "overlap_comm"):
            # It goes through its groups after the last backward pass (`reduce_gradients`).
            order = [name for group in scenario.groups for name in group.parameters]
        filled = fill_buckets(scenario, order)
        if not setting(scenario, "reduce_scatter") or not setting(scenario, "contiguous_gradients"):
            return "all_reduce", len(filled)  # `buffered_reduce_fallback`: it knows no slices
        together = setting(scenario, "use_multi_rank_bucket_allreduce")
        calls = 0
        for bucket in filled:
            if together and scenario.elements(bucket) <= limit:
                calls += 1
                continue
            slices: dict[int, list[int]] = {}
            for name in bucket:
                for rank, part in enumerate(self._flat(scenario)[name]):
                    if part.numel:
                        slices.setdefault(0 if together else rank, []).append(part.numel)
            calls += sum(closed_buckets(numels, limit) for numels in slices.values())
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


def _largest(scenario: Scenario) -> int:
    """Elements of the largest parameter."""
    return max(map(scenario.numel, scenario.shapes))


@functools.lru_cache(maxsize=4)
def _partitions(
    groups: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...], world_size: int, align: int
) -> dict[str, Intervals]:
    return {name: cuts for group in groups for name, cuts in flat_partition(dict(group), world_size, align).items()}
