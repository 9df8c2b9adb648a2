"""What the targets of several capstones have in common (a lesson's target.py)."""

from strategies.ledger.terms import FP32, Entry, Scenario, entry

WHY = "yours, against what the lesson asks for"
"""Of every remainder."""


def momentum_gathered(usual: list[Entry], scenario: Scenario) -> list[Entry]:
    """A strategy's traffic where all gather a slice of Muon's momentum, in place of the exchange between owners."""
    found = [line for line in usual if line.purpose != "updates"]
    for group in scenario.matrix_groups:
        numel = scenario.elements(group.parameters)
        found += entry(scenario.world_size, "all_gather", "updates", 1, numel, FP32 * numel)
    return found
