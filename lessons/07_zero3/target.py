"""What the capstone of lesson 7 should hold and send."""

from dataclasses import replace

from strategies.ledger.terms import FP32, Entry, Modules, Moments, Scenario, entry
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
        usual = [e for e in super().traffic(asked, rank, modules) if e.purpose != "updates"]
        for group in scenario.matrix_groups:
            numel = scenario.elements(group.parameters)
            usual += entry(scenario.world_size, "all_gather", "updates", 1, numel, FP32 * numel)
        return usual

    def why_remainder(self, moment: str, category: str) -> str:
        return "yours, against what the lesson asks for"


MESSAGES = ("all_gather", "reduce_scatter", "all_reduce", "reduce", "broadcast")
"""That may be on their way while the passes compute."""


def most(scenario: Scenario) -> dict[str, int]:
    """Bytes alive at once while backward runs: the rank's cuts, and whole parameters of most of a small model."""
    own = max(rank["after backward"]["parameters"] for rank in Books().states(scenario))
    gradients = max(rank["after backward"]["gradients"] for rank in Books().states(scenario))
    largest = FP32 * max(map(scenario.numel, scenario.shapes))
    return {"parameters": own + FP32 * scenario.parameters * 3 // 4, "gradients": gradients + 2 * largest}
