"""What the capstone of lesson 4 should hold and send."""

from lessons.capstone.targets import WHY
from strategies.ddp.books import DDPBooks, buckets
from strategies.ledger.terms import FP32, Entry, Held, Modules, Moments, Scenario, entry


class Books(DDPBooks):
    """DDP's, but for Muon: every rank transforms every matrix, so gradients are all-reduced like the others."""

    def owners(self, scenario: Scenario) -> dict[str, int]:
        return {}

    def waiting(self, scenario: Scenario, moments: Moments, rank: int) -> Held:
        """Gradients add up in the buckets themselves."""
        return {"gradients": moments["after step"]["gradients"]}

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        numel = scenario.parameters
        calls = buckets([FP32 * scenario.numel(name) for name in reversed(scenario.shapes)])
        return entry(scenario.world_size, "all_reduce", "gradients", calls, numel, FP32 * numel)

    def why_remainder(self, moment: str, category: str) -> str:
        return WHY


MESSAGES = ("all_reduce", "reduce_scatter", "all_gather", "reduce", "broadcast")
"""That may be on their way while backward computes."""

BUCKET = 2**18
"""Bytes."""
