"""What DDP holds, sends and hides: as single, but a matrix's momentum is kept by its owner alone."""

from collections.abc import Sequence

from strategies.layout import on_rank
from strategies.ledger.terms import (
    FP32,
    BackwardMoment,
    ComputePrecision,
    Entry,
    Held,
    Modules,
    Moments,
    Resolved,
    Scenario,
    StrategyBooks,
    entry,
    moments,
)
from strategies.owners import Matrix, assign_owners, banks, is_cut


class DDPBooks(StrategyBooks):
    """See strategies.ledger.terms.StrategyBooks."""

    computes_bf16: ComputePrecision = "autocast"
    precision_in_words = "float32 weights and gradients, matrix products in 16 bits (autocast)"
    words = {
        "parameters": "whole, float32 (autocast casts for use)",
        "master parameters": "none: the parameters are float32",
        "gradients": "whole, float32, in the buckets",
        "waiting": "twice: added up, and the buckets",
        "optimizer states": "all of AdamW's; Muon's if it owns them",
        "activations": "under autocast",
        "buffers": "none beside the gradients",
    }

    def settings(self, scenario: Scenario) -> list[Resolved]:
        apart = self.apart(scenario)
        whole = FP32 * scenario.elements([name for name in scenario.shapes if name not in apart])
        return [
            Resolved("gradient_as_bucket_view", "True", "gradients are views of the buckets, and count once", False),
            Resolved("bucket_cap_mb", "25", f"buckets of 25 MiB, {whole / 2**20:,.1f} MiB in all; they stay", False),
        ]

    def states(self, scenario: Scenario) -> list[Moments]:
        """Gradients are views of DDP's buckets, so they count once; and the buckets, which hold the gradients of all
        that has no owner, stay when gradients are cleared.
        """
        owners, cut = self.owners(scenario), self.cut(scenario)
        replicated, owned = 0, [0] * scenario.world_size
        for g in scenario.groups:
            for n in g.parameters:
                if n in owners:
                    owned[owners[n]] += g.state_bytes * scenario.numel(n)
                else:
                    parts = scenario.world_size if n in cut else 1
                    replicated += g.state_bytes * scenario.numel(n) // parts + g.holder_bytes
        whole = FP32 * scenario.parameters
        buckets = FP32 * sum(scenario.numel(n) for n in scenario.shapes if n not in self.apart(scenario))
        return [moments(whole, 0, whole, replicated + mine, resident=buckets) for mine in owned]

    def owners(self, scenario: Scenario) -> dict[str, int]:
        """Only of the matrices that are kept out of the buckets."""
        matrices = {n: scenario.shapes[n] for group in scenario.matrix_groups for n in group.parameters}
        return assign_owners(matrices, scenario.world_size)

    def cut(self, scenario: Scenario) -> set[str]:
        """AdamW's parameters of which each rank updates a part (`sharded`)."""
        names = [n for group in scenario.groups if group.sharded for n in group.parameters]
        return {n for n in names if is_cut(scenario.shapes[n], scenario.world_size)}

    def apart(self, scenario: Scenario) -> set[str]:
        """All that is kept out of the buckets."""
        return {*self.owners(scenario), *self.cut(scenario)}

    def waiting(self, scenario: Scenario, moments: Moments, rank: int) -> Held:
        """Twice: under no_sync autograd makes gradients of its own, and they are copied into the buckets, which have
        been there all the time, only when the last micro-batch's are reduced.
        """
        return {"gradients": moments["after backward"]["gradients"] + moments["after step"]["gradients"]}

    def in_backward(self, scenario: Scenario, passes: Sequence[BackwardMoment]) -> list[Held]:
        """New gradients lie in the buckets; only what is kept out of them has gradients of its own."""
        if scenario.accumulation > 1:
            return [{} for _ in passes]
        names = self.apart(scenario)
        apart = [[name for name in moment.made if name in names] for moment in passes]
        return [{"gradients": FP32 * elements} for elements in scenario.so_far(apart)]

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        """An all-reduce of all gradients that AdamW uses, in float32 (autocast casts weights, not gradients), at the
        last micro-batch (`no_sync` before). A tied weight is one parameter and so goes once.

        Muon's matrices are outside of DDP's buckets: a reduce-scatter per bank of matrices of one size, and an
        all-gather of their updates. Banks have as many places for every rank, and empty ones are sent too. Where
        AdamW's parameters are cut (`sharded`), each has a reduce-scatter of its gradient and an all-gather of itself.
        """
        ranks, owners, cut = scenario.world_size, self.owners(scenario), self.cut(scenario)
        rest = [name for name in scenario.shapes if name not in owners and name not in cut]
        reduced = scenario.elements(rest)
        calls = buckets([FP32 * scenario.numel(name) for name in reversed(rest)])
        entries = entry(ranks, "all_reduce", "gradients", calls, reduced, FP32 * reduced)
        matrices = {
            name: Matrix(name, scenario.shapes[name], on_rank(scenario.shapes[name], owner, ranks), owner)
            for name, owner in ((n, owners[n]) for group in scenario.matrix_groups for n in group.parameters)
        }
        for collective, together in (
            ("reduce_scatter", [tuple(matrices)]),
            ("all_gather", [group.parameters for group in scenario.matrix_groups]),
        ):
            made = [bank for names in together for bank in banks((matrices[name] for name in names), ranks)]
            sent = sum(bank.sent for bank in made)
            sent += scenario.elements(tuple(cut))
            entries += entry(ranks, collective, "updates", len(made) + len(cut), sent, FP32 * sent)
        return entries + entry(
            ranks, "all_reduce", "bookkeeping", 1 if owners or cut else 0, 0, FP32
        )  # the global norm

    def volume_in_words(self, scenario: Scenario) -> str:
        same = " (Muon's share as reduce-scatter and all-gather, with empty places)" if scenario.matrix_groups else ""
        return f"2Ψ: an all-reduce of gradients, once a step{same}"

    def hidden_by(self, compute: float, accumulation: int) -> dict[str, float]:
        """Gradients are reduced during the last backward pass."""
        return {"gradients": compute * 2 / 3 / accumulation}

    def published(self, psi: int, ranks: int, largest_layer: int) -> dict[str, int]:
        """The ZeRO paper (arXiv 1910.02054, section 3): 2 bytes of parameters, 2 of gradients, 12 of the rest.
        Megatron-LM's theoretical memory: 18 bytes, its gradients are float32.
        """
        return {"ZeRO paper": 16 * psi, "Megatron": 18 * psi}

    def why_remainder(self, moment: str, category: str) -> str:
        if (moment, category) == ("after prepare", "gradients"):
            return "DDP's buckets, which only its C++ can see before the first backward pass"
        return ""


def buckets(sizes: Sequence[int]) -> int:
    """Buckets that DDP's reducer makes of gradients of these bytes, in the order in which backward produces them.

    A bucket is closed once it holds its limit, 1 MiB for the first and 25 MiB for the others (bucket_cap_mb;
    `compute_bucket_assignment_by_size` in reducer.cpp, torch 2.13). The real order is that of the first backward pass;
    the books take the reverse of the names.
    """
    closed, filled = 0, 0
    for size in sizes:
        filled += size
        if filled >= (1 if closed == 0 else 25) * 2**20:
            closed, filled = closed + 1, 0
    return closed + (filled > 0)


def books(name: str) -> StrategyBooks:
    """For strategies.catalogue."""
    return DDPBooks()
