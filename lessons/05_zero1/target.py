"""What the capstone of lesson 5 should hold and send."""

from lessons.capstone.targets import WHY, momentum_gathered
from strategies.ledger.terms import Entry, Modules, Scenario
from strategies.zero.books_flat import FlatBooks


class Books(FlatBooks):
    """DeepSpeed's ZeRO-1, but for Muon: a slice of the momentum is gathered by all, in place of an exchange."""

    needs = ""

    def __init__(self) -> None:
        super().__init__(1)

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        return momentum_gathered(super().traffic(scenario, rank, modules), scenario)

    def why_remainder(self, moment: str, category: str) -> str:
        return WHY


MESSAGES = ("all_reduce", "reduce_scatter", "reduce")
"""That may be on their way while backward computes."""
