"""single: everything, in float32; in bf16 and fp16 too, because autocast casts a weight for the moment of its use."""

from strategies.ledger.terms import FP32, ComputePrecision, Held, Moments, Scenario, StrategyBooks, moments
from strategies.owners import assign_owners


class SingleBooks(StrategyBooks):
    """See strategies.ledger.terms.StrategyBooks."""

    computes_bf16: ComputePrecision = "autocast"
    precision_in_words = "float32 weights and gradients, matrix products in 16 bits (autocast)"
    words = {
        "parameters": "whole, float32",
        "master parameters": "none: the parameters are float32",
        "gradients": "whole, float32",
        "waiting": "whole, float32",
        "optimizer states": "all",
        "activations": "under autocast",
        "buffers": "none",
    }

    def fits(self, world_size: int) -> bool:
        return world_size == 1

    def states(self, scenario: Scenario) -> list[Moments]:
        states = sum(g.state_bytes * scenario.numel(n) + g.holder_bytes for g in scenario.groups for n in g.parameters)
        return [moments(FP32 * scenario.parameters, 0, FP32 * scenario.parameters, states)]

    def owners(self, scenario: Scenario) -> dict[str, int]:
        matrices = {n: scenario.shapes[n] for group in scenario.matrix_groups for n in group.parameters}
        return assign_owners(matrices, scenario.world_size)

    def waiting(self, scenario: Scenario, moments: Moments, rank: int) -> Held:
        return {"gradients": moments["after backward"]["gradients"]}


def books(name: str) -> StrategyBooks:
    """For strategies.catalogue."""
    return SingleBooks()
