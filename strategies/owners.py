"""Which rank transforms which matrix, and in which order: decided from shapes alone, the same on every rank.

Pure Python without torch, like strategies/layout.py: the predicted books need it where no torch is loaded.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from strategies.layout import EMPTY, Intervals, Shape

ROUND_ELEMENTS = 25 * 2**20 // 4
"""Elements that a round of the exchange carries over all owners together: 25 MiB in float32, as a bucket of DDP."""


BANK_ELEMENTS = 2**26
"""Elements of a bank at most, all ranks' together: 256 MiB in float32. A matrix per rank it always has."""


CUT_FROM = 4096
"""Elements below which a parameter is not worth a message of its own."""


def is_cut(shape: Shape, world_size: int) -> bool:
    """Whether DDP cuts a parameter of an elementwise rule into equal parts, one for each rank to update, where the
    recipe asks for that (`sharded`): it is large enough, and divides."""
    numel = math.prod(shape)
    return world_size > 1 and numel >= CUT_FROM and numel % world_size == 0


@dataclass(frozen=True)
class Matrix:
    """A matrix, who holds which part of its update before the exchange, and who transforms it."""

    name: str
    shape: Shape
    held: Intervals
    owner: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def in_one_piece(self) -> bool:
        """The owner holds everything already."""
        return all(part == EMPTY or rank == self.owner for rank, part in enumerate(self.held))


@dataclass(frozen=True)
class Bank:
    """Matrices of as many elements each that travel together, in one message: equally many places for every owner.

    of_rank: the matrices of each owner. Who has fewer of them than others fills up with zeros.
    """

    numel: int
    of_rank: list[list[Matrix]]

    @property
    def places(self) -> int:
        """For matrices, of each rank."""
        return max(map(len, self.of_rank))

    @property
    def sent(self) -> int:
        """Elements of the message, empty places too."""
        return self.places * len(self.of_rank) * self.numel


def banks(matrices: Iterable[Matrix], world_size: int) -> list[Bank]:
    """All matrices once, those of one size together; a large bank is cut where it has more than BANK_ELEMENTS."""
    sizes: dict[int, list[list[Matrix]]] = {}
    for matrix in sorted(matrices, key=lambda matrix: (-matrix.numel, matrix.shape)):
        sizes.setdefault(matrix.numel, [[] for _ in range(world_size)])[matrix.owner].append(matrix)
    made = []
    for numel, queues in sizes.items():
        places = max(1, BANK_ELEMENTS // (numel * world_size))
        for first in range(0, max(map(len, queues)), places):
            made.append(Bank(numel, [queue[first : first + places] for queue in queues]))
    return made


def assign_owners(
    shapes: dict[str, Shape], world_size: int, held: dict[str, Intervals] | None = None
) -> dict[str, int]:
    """The owner of each matrix: the rank that holds most of it; among equals, the one with the least work so far.

    Largest matrices first, so that the small ones even out the load. Work is counted as rows · columns · min(rows,
    columns), what a product XXᵀ costs. The same on every rank, without communication.

    held: None where every rank holds everything. Then no rank gets more matrices of one size than its equal share,
    rounded up: they travel in banks, and who has one more than the others costs all of them a place.
    """
    load = [0] * world_size
    owners = {}
    sizes = Counter(map(math.prod, shapes.values()))
    full: dict[int, Counter[int]] = {numel: Counter() for numel in sizes}
    candidates: dict[Intervals, Sequence[int]] = {}  # many matrices share their intervals
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), shapes[name])):
        parts = held[name] if held else ()
        if parts not in candidates:
            most = max((part.numel for part in parts), default=0)
            candidates[parts] = [r for r, part in enumerate(parts) if part.numel == most] or range(world_size)
        numel = math.prod(shapes[name])
        share = -(-sizes[numel] // world_size)
        free = [r for r in candidates[parts] if held or full[numel][r] < share]
        owner = min(free, key=load.__getitem__)
        full[numel][owner] += 1
        owners[name] = owner
        load[owner] += math.prod(shapes[name]) * min(shapes[name])
    return owners


def rounds(matrices: Iterable[Matrix], world_size: int) -> list[list[list[Matrix]]]:
    """Rounds of a few matrices per owner: `rounds[k][rank]` are those of that rank in round k.

    A rank's matrices of a round have at most ROUND_ELEMENTS / world_size elements, or are one matrix; so tiny matrices
    share a message and large ones go one by one. Every owner's matrices are sorted by shape, so that a round is as even
    as can be.
    """
    queues: list[list[Matrix]] = [[] for _ in range(world_size)]
    for matrix in sorted(matrices, key=lambda matrix: (-matrix.numel, matrix.shape)):
        queues[matrix.owner].append(matrix)
    turns = itertools.zip_longest(*(_pieces(queue, ROUND_ELEMENTS // world_size) for queue in queues), fillvalue=[])
    return [list(turn) for turn in turns]


def _pieces(queue: list[Matrix], limit: int) -> list[list[Matrix]]:
    pieces: list[list[Matrix]] = []
    filled = limit
    for matrix in queue:
        if filled + matrix.numel > limit:
            pieces.append([])
            filled = 0
        pieces[-1].append(matrix)
        filled += matrix.numel
    return pieces
