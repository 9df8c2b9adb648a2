"""Which rank transforms which matrix, and in which order: decided from shapes alone, the same on every rank.

Pure Python without torch, like strategies/layout.py: the predicted books need it where no torch is loaded.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from strategies.layout import EMPTY, Intervals, Shape

ROUND_ELEMENTS = 25 * 2**20 // 4
"""Elements that a round of the exchange carries over all owners together: 25 MiB in float32, as a bucket of DDP."""


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


def assign_owners(
    shapes: dict[str, Shape], world_size: int, held: dict[str, Intervals] | None = None
) -> dict[str, int]:
    """The owner of each matrix: the rank that holds most of it; among equals, the one with the least work so far.

    Largest matrices first, so that the small ones even out the load. Work is counted as rows · columns · min(rows,
    columns), what a product XXᵀ costs. The same on every rank, without communication.
    """
    load = [0] * world_size
    owners = {}
    candidates: dict[Intervals, Sequence[int]] = {}  # many matrices share their intervals
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), shapes[name])):
        parts = held[name] if held else ()
        if parts not in candidates:
            most = max((part.numel for part in parts), default=0)
            candidates[parts] = [r for r, part in enumerate(parts) if part.numel == most] or range(world_size)
        owner = min(candidates[parts], key=load.__getitem__)
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
