"""What Muon's exchange of whole matrices sends under FSDP and ZeRO, and who owns which. Plain Python, no torch."""

from collections.abc import Callable, Sequence

from strategies.layout import Intervals
from strategies.ledger.terms import FP32, Entry, Names, Scenario, entry
from strategies.owners import Matrix, assign_owners, rounds


def owners_of(scenario: Scenario, held: dict[str, Intervals], world_size: int) -> dict[str, int]:
    """The owner of each matrix. All that is two-dimensional counts as load, under whatever rule.

    held: every parameter's intervals, in the optimizer's order; world_size: ranks that share matrices out.
    """
    matrices = {name: cuts for name, cuts in held.items() if len(scenario.shapes[name]) == 2}
    return assign_owners({name: scenario.shapes[name] for name in matrices}, world_size, matrices)


def exchange(
    scenario: Scenario,
    rank: int,
    held: Callable[[], dict[str, Intervals]],
    together: Sequence[Names],
    world_size: int | None = None,
) -> list[Entry]:
    """Two all-to-alls per round of owners, always float32: the pieces of gradients in, the pieces of updates back
    (strategies/matrices.py). A matrix that lies whole on its owner is not sent at all.

    held: gives every parameter's intervals, in the optimizer's order; together: matrices that share rounds.
    world_size: ranks that share matrices out, by default all; rank: among them.
    """
    if not together:
        return []
    ranks = world_size or scenario.world_size
    intervals = held()
    owners = owners_of(scenario, intervals, ranks)
    calls = elements = 0
    for names in together:
        matrices = [Matrix(name, scenario.shapes[name], intervals[name], owners[name]) for name in names]
        turns = rounds((matrix for matrix in matrices if not matrix.in_one_piece), ranks)
        calls += 2 * len(turns)
        for matrix in (matrix for turn in turns for theirs in turn for matrix in theirs):
            here = matrix.held[rank].numel
            elements += matrix.numel - here if matrix.owner == rank else here
    return entry(ranks, "all_to_all", "updates", calls, elements, FP32 * elements)
