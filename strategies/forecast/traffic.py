"""Predicted traffic: what every rank sends in one optimizer step, by collective, from shapes and settings alone.

Plain Python, no torch. What a strategy sends, its own books say (strategies/*/books.py). Nothing there has seen a live
tensor or the meter (strategies/ledger/wire.py), whose definitions of payload and ring bytes it shares. A *step* here is
one in the middle of a run: first steps send a little more (DDP agrees on its buckets, DeepSpeed records the order of
modules and compares it between ranks), evaluations are not counted, and neither is the loss that the training loop
averages.
"""

from collections.abc import Sequence

from strategies import catalogue
from strategies.ledger.terms import Entry, Modules, Scenario


def predict_traffic(scenario: Scenario, rank: int = 0, modules: Modules | None = None) -> list[Entry]:
    """What `rank` sends in one step. Nothing on one rank.

    modules: of the model; by default the scenario's, or those that the names tell of.
    """
    if scenario.world_size == 1:
        return []
    return catalogue.books(scenario.strategy).traffic(scenario, rank, modules)


def paper_volumes(entries: Sequence[Entry], parameters: int) -> dict[str, float]:
    """Purpose → elements sent, in multiples of Ψ, as the ZeRO paper counts (section 7: an all-reduce is a
    reduce-scatter and an all-gather, so 2Ψ; everything else Ψ). Before padding, without bookkeeping; "total" last.
    """
    volumes: dict[str, float] = {}
    for entry in entries:
        if entry.purpose != "bookkeeping":
            weight = 2 if entry.collective == "all_reduce" else 1
            volumes[entry.purpose] = volumes.get(entry.purpose, 0.0) + weight * entry.elements / parameters
    return {**volumes, "total": sum(volumes.values())}


def explain_volume(scenario: Scenario) -> str:
    """One line for a table: why this strategy sends what it sends, and not what the ZeRO paper says."""
    return catalogue.books(scenario.strategy).volume_in_words(scenario)
