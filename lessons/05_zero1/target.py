"""What the capstone of lesson 5 should hold and send."""

from strategies.ledger.terms import FP32, Entry, Modules, Scenario, entry
from strategies.zero.books_flat import FlatBooks


class Books(FlatBooks):
    """DeepSpeed's ZeRO-1, but for Muon: a slice of the momentum is gathered by all, in place of an exchange."""

    needs = ""

    def __init__(self) -> None:
        super().__init__(1)

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        usual = [e for e in super().traffic(scenario, rank, modules) if e.purpose != "updates"]
        for group in scenario.matrix_groups:
            numel = scenario.elements(group.parameters)
            usual += entry(scenario.world_size, "all_gather", "updates", 1, numel, FP32 * numel)
        return usual

    def why_remainder(self, moment: str, category: str) -> str:
        return "yours, against what the lesson asks for"


MESSAGES = ("all_reduce", "reduce_scatter", "reduce")
"""That may be on their way while backward computes."""
