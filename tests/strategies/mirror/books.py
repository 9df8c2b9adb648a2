"""What the mirror holds and sends. Muon's matrices have owners, as under DDP."""

from strategies.ddp.books import DDPBooks
from strategies.ledger.terms import FP32, Entry, Held, Modules, Moments, Scenario, StrategyBooks, entry
from strategies.ledger.terms import moments as three


class MirrorBooks(DDPBooks):
    """See strategies.ledger.terms.Books."""

    words = {**DDPBooks.words, "gradients": "whole, float32", "waiting": "whole, float32"}

    def states(self, scenario: Scenario) -> list[Moments]:
        """No bucket stays."""
        found = []
        for rank in super().states(scenario):
            states = rank["after step"]["optimizer states"]
            found.append(three(FP32 * scenario.parameters, 0, FP32 * scenario.parameters, states))
        return found

    def waiting(self, scenario: Scenario, moments: Moments, rank: int) -> Held:
        return {"gradients": FP32 * scenario.parameters}

    def traffic(self, scenario: Scenario, rank: int, modules: Modules | None) -> list[Entry]:
        """DDP's, but with a call per gradient; one of a single number is no payload for the meter."""
        rest = [name for name in scenario.shapes if name not in self.owners(scenario)]
        numbers = [name for name in rest if scenario.numel(name) == 1]
        larger = [name for name in rest if name not in numbers]
        entries = [e for e in super().traffic(scenario, rank, modules) if e.purpose != "gradients"]
        for purpose, names in (("gradients", larger), ("bookkeeping", numbers)):
            elements = scenario.elements(names)
            entries += entry(scenario.world_size, "all_reduce", purpose, len(names), elements, FP32 * elements)
        return entries

    def volume_in_words(self, scenario: Scenario) -> str:
        return "2Ψ: an all-reduce of every gradient"

    def hidden_by(self, compute: float, accumulation: int) -> dict[str, float]:
        """Nothing: gradients are reduced after the last backward pass."""
        return {}

    def why_remainder(self, moment: str, category: str) -> str:
        return ""


def books(name: str) -> StrategyBooks:
    """For strategies.catalogue."""
    return MirrorBooks()
