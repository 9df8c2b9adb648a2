"""Which elements of each parameter each rank holds: one interval per rank.

Under every strategy a rank's part of a parameter is one interval (possibly empty) of its flattened elements:

    single, DDP   everything, on every rank
    FSDP2         a block of rows
    ZeRO-1, -2    whatever falls into the rank's slice of a flat buffer that all parameters of a group share
    ZeRO-3        an equal cut of each parameter, the last one short or empty

The functions here compute these intervals from shapes and world size alone, in plain Python. Four things stand on
them: the optimizer's slices, the exchange of whole matrices for Muon, strategy-neutral state, and the predicted
bytes.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

Shape = tuple[int, ...]


class Interval(NamedTuple):
    """Elements [start, stop) of a flattened parameter."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


Intervals = tuple[Interval, ...]
"""One interval per rank."""


def speaks(held: Intervals, rank: int) -> bool:
    """Whether this rank is the first of those that hold exactly the same part. Of equal copies only the first counts:
    in a sum over ranks, and where one of them has to say what all hold.
    """
    return held.index(held[rank]) == rank


EMPTY = Interval(0, 0)


@cache  # blocks repeat shapes, and a plan may ask for a thousand ranks
def everywhere(shape: Shape, world_size: int) -> Intervals:
    """single, DDP: every rank holds all of it."""
    return (Interval(0, math.prod(shape)),) * world_size


def on_rank(shape: Shape, owner: int, world_size: int) -> Intervals:
    """One rank holds all of it, the others nothing: the optimizer state of a matrix under DDP with owners."""
    return tuple(Interval(0, math.prod(shape)) if rank == owner else EMPTY for rank in range(world_size))


@cache
def row_blocks(shape: Shape, world_size: int) -> Intervals:
    """FSDP2: dimension 0 is cut into blocks of ceil(rows / world_size) rows, as torch.chunk does."""
    rows = shape[0]
    row = math.prod(shape[1:])
    block = math.ceil(rows / world_size)
    return tuple(
        Interval(min(rank * block, rows) * row, min((rank + 1) * block, rows) * row) for rank in range(world_size)
    )


@cache
def equal_cuts(shape: Shape, world_size: int) -> Intervals:
    """ZeRO-3: every parameter is flattened, padded to a multiple of the world size, and cut into equal parts."""
    numel = math.prod(shape)
    part = math.ceil(numel / world_size)
    return tuple(Interval(min(rank * part, numel), min((rank + 1) * part, numel)) for rank in range(world_size))


def flat_starts(numels: Sequence[int], align: int = 1) -> list[int]:
    """ZeRO-1/2: where each parameter of a group begins in its flat buffer; last of all where the buffer's filled part
    ends. align: every parameter begins at a multiple of so many elements (DeepSpeed's parameter_alignment).
    """
    starts = [0]
    for index, numel in enumerate(numels):
        end = starts[-1] + numel
        starts.append(end if index == len(numels) - 1 else math.ceil(end / align) * align)
    return starts


def flat_partition_size(numels: Sequence[int], world_size: int, align: int = 1) -> int:
    """ZeRO-1/2: elements of one rank's slice of a group's flat buffer, padding included.

    DeepSpeed pads the buffer to a multiple of 2 · world_size, so that every slice starts on 4 bytes in 16-bit dtypes.
    align: as in `flat_starts`.
    """
    multiple = 2 * world_size
    return math.ceil(flat_starts(numels, align)[-1] / multiple) * multiple // world_size


def flat_partition(shapes: dict[str, Shape], world_size: int, align: int = 1) -> dict[str, Intervals]:
    """ZeRO-1/2: the parameters of one group end to end in a flat buffer, the buffer cut into equal slices.

    align: as in `flat_starts`.
    """
    numels = [math.prod(shape) for shape in shapes.values()]
    part = flat_partition_size(numels, world_size, align)
    intervals = {}
    for name, numel, offset in zip(shapes, numels, flat_starts(numels, align), strict=False):
        cuts = [EMPTY] * world_size
        for rank in range(offset // part, (offset + numel - 1) // part + 1):
            cuts[rank] = Interval(max(rank * part - offset, 0), min((rank + 1) * part - offset, numel))
        intervals[name] = tuple(cuts)
    return intervals
