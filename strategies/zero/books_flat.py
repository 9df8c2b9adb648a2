"""What ZeRO-1 and ZeRO-2 hold and send: whole parameters; one slice of every group's flat buffer of the rest.

Plain Python, no torch. The places named are those in DeepSpeed 0.19.8.
"""

import functools

from strategies.layout import Intervals, flat_partition, flat_partition_size
from strategies.ledger.exchange import exchange, owners_of
from strategies.ledger.terms import FP32, Entry, Held, Modules, Moments, Scenario, entry, moments
from strategies.zero.common import (
    ZeroBooks,
    closed_buckets,
    deepspeed_live,
    fill_buckets,
    reduce_bucket,
    reduce_width,
    setting,
)
from strategies.zero.defaults import accumulates_float32


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
            collective, calls, reduced = "all_reduce", closed_buckets(flat, 500_000_000), sum(flat)
        else:
            (collective, calls), reduced = self._reductions(scenario), scenario.parameters
        times = scenario.accumulation if self.stage == 2 else 1
        payload = times * reduce_width(scenario) * reduced
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
        filled = fill_buckets(scenario, order)
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


def _flat(scenario: Scenario) -> dict[str, Intervals]:
    """Every parameter's intervals under ZeRO-1/2, group by group."""
    groups = [tuple((name, scenario.shapes[name]) for name in group.parameters) for group in scenario.groups]
    return _partitions(tuple(groups), scenario.world_size)


def _padding(scenario: Scenario, rank: int) -> int:
    """Elements of the padding in this rank's slices of ZeRO-1/2's flat buffers."""
    padding = 0
    for group in scenario.groups:
        numels = [scenario.numel(name) for name in group.parameters]
        part = flat_partition_size(numels, scenario.world_size)
        padding += part - min(max(sum(numels) - rank * part, 0), part)
    return padding


@functools.lru_cache(maxsize=4)
def _partitions(groups: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...], world_size: int) -> dict[str, Intervals]:
    return {name: cuts for group in groups for name, cuts in flat_partition(dict(group), world_size).items()}
