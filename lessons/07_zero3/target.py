"""What the capstone of lesson 7 should hold and send."""

from dataclasses import replace

from lessons.capstone.targets import WHY, momentum_gathered
from strategies.ledger.terms import FP32, Entry, Modules, Moments, Scenario
from strategies.zero.books_partitioned import PartitionedBooks

LET_GO = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}}
"""The DeepSpeed settings that let go of every module's parameters after it."""


class Books(PartitionedBooks):
    """DeepSpeed's ZeRO-3 that keeps nothing whole; but for Muon: all gather a slice of the momentum."""

    needs = ""

    def __init__(self) -> None:
        super().__init__(3)

    def states(self, scenario: Scenario) -> list[Moments]:
        return super().states(replace(scenario, engine=LET_GO))

    def kept_gathered(self, scenario: Scenario) -> int:
        return super().kept_gathered(replace(scenario, engine=LET_GO))

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        asked = replace(scenario, engine=LET_GO)
        return momentum_gathered(super().traffic(asked, rank, modules), scenario)

    def why_remainder(self, moment: str, category: str) -> str:
        return WHY


MESSAGES = ("all_gather", "reduce_scatter", "all_reduce", "reduce", "broadcast")
"""That may be on their way while the passes compute."""


def most(scenario: Scenario) -> dict[str, int]:
    """Bytes alive at once while backward runs: the rank's cuts, and whole parameters of most of a small model."""
    ends = [rank["after backward"] for rank in Books().states(scenario)]
    own, gradients = max(end["parameters"] for end in ends), max(end["gradients"] for end in ends)
    largest = FP32 * max(map(scenario.numel, scenario.shapes))
    return {"parameters": own + FP32 * scenario.parameters * 3 // 4, "gradients": gradients + 2 * largest}
