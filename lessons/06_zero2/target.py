"""What the capstone of lesson 6 should hold and send."""

from dataclasses import replace

from lessons.capstone.targets import WHY, momentum_gathered
from strategies.ledger.terms import FP32, Entry, Modules, Scenario
from strategies.zero.books_flat import FlatBooks

TO_OWNERS = {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False}}
"""The DeepSpeed setting that reduces every gradient to its owner."""


class Books(FlatBooks):
    """DeepSpeed's ZeRO-2, but for Muon: a slice of the momentum is gathered by all, in place of an exchange."""

    needs = ""

    def __init__(self) -> None:
        super().__init__(2)

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        asked = replace(scenario, engine=TO_OWNERS)
        return momentum_gathered(super().traffic(asked, rank, modules), scenario)

    def why_remainder(self, moment: str, category: str) -> str:
        return WHY


MESSAGES = ("all_reduce", "reduce_scatter", "reduce")
"""That may be on their way while backward computes."""

BUCKET = 2**16
"""Bytes of gradients that wait for each other."""


def most(scenario: Scenario) -> dict[str, int]:
    """Bytes alive at once while backward runs: the rank's own, two buckets, and a gradient that came just now."""
    largest = FP32 * max(map(scenario.numel, scenario.shapes))
    own = max(rank["after backward"]["gradients"] for rank in Books().states(scenario))
    return {"gradients": own + 2 * max(BUCKET, largest) + largest}
