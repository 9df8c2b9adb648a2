"""Which rank transforms which matrix, and in which order: decided from shapes alone, the same on every rank.

Pure Python without torch, like strategies/layout.py: the predicted books need it where no torch is loaded.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from strategies.layout import EMPTY, Intervals, Shape


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
    candidates: dict[int, Sequence[int]] = {}  # by the identity of the intervals: many matrices share theirs
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), shapes[name])):
        parts = held[name] if held else ()
        if id(parts) not in candidates:
            most = max((part.numel for part in parts), default=0)
            candidates[id(parts)] = [r for r, part in enumerate(parts) if part.numel == most] or range(world_size)
        owner = min(candidates[id(parts)], key=load.__getitem__)
        owners[name] = owner
        load[owner] += math.prod(shapes[name]) * min(shapes[name])
    return owners


def rounds(matrices: Iterable[Matrix], world_size: int) -> list[list[Matrix | None]]:
    """Rounds of one matrix per owner: `rounds[k][rank]` is that rank's matrix in round k, or None.

    Every owner's matrices are sorted by shape, so that a round's matrices have equal shapes wherever possible.
    """
    queues: list[list[Matrix]] = [[] for _ in range(world_size)]
    for matrix in sorted(matrices, key=lambda matrix: (-matrix.numel, matrix.shape)):
        queues[matrix.owner].append(matrix)
    return [list(turn) for turn in itertools.zip_longest(*queues)]
