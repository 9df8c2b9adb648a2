"""What a GPU's memory says of a rank: a model of torch's caching allocator, and cuBLAS's workspaces. Plain Python.

torch.cuda.memory_allocated is no sum of tensors. A tensor gets a block of a segment that the allocator keeps, in
multiples of 512 bytes, and a block that is larger is split only where more than 1 MiB would be left. So the same
tensors take more, or less, by what was allocated and released before (c10/cuda/CUDACachingAllocator.cpp, with the
default settings; segments are never given back here, as long as memory is not short).
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

MIB = 2**20
SMALL = MIB
"""Up to here a request is served from segments of 2 MiB, cut at every 512 bytes."""

HOPPER_WORKSPACE, OLDER_WORKSPACE = 32 * MIB, 2 * 4 * MIB + 8 * 16 * 1024
"""Bytes of a workspace of cuBLAS (aten/src/ATen/cuda/CublasHandlePool.cpp; CUBLAS_WORKSPACE_CONFIG changes them)."""

THREADS = 2
"""That multiply matrices, with a handle of cuBLAS each: the program's own, and autograd's for the backward pass."""


def workspaces(capability: tuple[int, int]) -> int:
    """Bytes that cuBLAS keeps from the first backward pass on: a workspace for each handle, on one stream."""
    return THREADS * workspace(capability)


def workspace(capability: tuple[int, int]) -> int:
    """Bytes of one, on a GPU of this compute capability."""
    return HOPPER_WORKSPACE if capability >= (9, 0) else OLDER_WORKSPACE


def block(bytes: int) -> int:
    """What a tensor takes in a segment of its own or in a fresh one; out of an older block up to 1 MiB more."""
    size = max(512, -(-bytes // 512) * 512)
    segment = _segment(size)
    return size if size <= SMALL or segment - size > MIB else segment


def _segment(size: int) -> int:
    """Bytes of a new segment for a block of this size."""
    if size <= SMALL:
        return 2 * MIB
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


@dataclass(eq=False)
class AllocatorBlock:
    """A part of a segment; before and after are its neighbours there."""

    segment: int
    offset: int
    size: int
    pool: tuple[str, bool]
    before: "AllocatorBlock | None" = None
    after: "AllocatorBlock | None" = None
    free: bool = False

    @property
    def order(self) -> tuple[int, int, int]:
        """The smallest first; among equal ones the oldest segment and the lowest address."""
        return self.size, self.segment, self.offset


@dataclass
class Allocator:
    """Bytes in blocks (allocated) and in segments (reserved). A pool is of one stream and of small or large blocks."""

    allocated: int = 0
    reserved: int = 0
    peak: int = 0
    segments: int = 0
    pools: dict[tuple[str, bool], list[AllocatorBlock]] = field(default_factory=dict)
    """The free blocks of each, in order."""

    def allocate(self, bytes: int, stream: str = "compute") -> AllocatorBlock:
        size = max(512, -(-bytes // 512) * 512)
        pool = (stream, size <= SMALL)
        free = self.pools.setdefault(pool, [])
        at = bisect.bisect_left(free, (size, 0, 0), key=lambda block: block.order)
        if at < len(free):
            taken = free.pop(at)
            taken.free = False
        else:
            self.segments += 1
            taken = AllocatorBlock(self.segments, 0, _segment(size), pool)
            self.reserved += taken.size
        rest = taken.size - size
        if rest >= 512 if size <= SMALL else rest > MIB:
            split = AllocatorBlock(taken.segment, taken.offset + size, rest, pool, taken, taken.after, free=True)
            if taken.after:
                taken.after.before = split
            taken.after, taken.size = split, size
            self._add(split)
        self.allocated += taken.size
        self.peak = max(self.peak, self.allocated)
        return taken

    def release(self, block: AllocatorBlock) -> None:
        """Free neighbours become one block."""
        self.allocated -= block.size
        block.free = True
        if block.before and block.before.free:
            first = block.before
            self._remove(first)
            first.size, first.after = first.size + block.size, block.after
            if block.after:
                block.after.before = first
            block = first
        if block.after and block.after.free:
            last = block.after
            self._remove(last)
            block.size, block.after = block.size + last.size, last.after
            if last.after:
                last.after.before = block
        self._add(block)

    def _add(self, block: AllocatorBlock) -> None:
        bisect.insort(self.pools[block.pool], block, key=lambda block: block.order)

    def _remove(self, block: AllocatorBlock) -> None:
        free = self.pools[block.pool]
        del free[bisect.bisect_left(free, block.order, key=lambda block: block.order)]


class Logged(Protocol):
    """What is read of a line of the tracer's log (strategies.ledger.tracer.Event, which needs torch)."""

    @property
    def kind(self) -> str: ...
    @property
    def id(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def stream(self) -> str: ...
    @property
    def flops(self) -> int: ...


@dataclass(frozen=True)
class Moment:
    """What the allocator says then, in bytes."""

    allocated: int
    reserved: int


def allocated(events: Iterable[Logged], step: int, capability: tuple[int, int]) -> dict[str, Moment]:
    """Play a log through the allocator: moments as strategies.ledger.replay has them, with cuBLAS's workspaces.

    events: from phase prepare to the end; step: the one that the result is about.
    """
    allocator, moments = Allocator(), {}
    alive: dict[int, AllocatorBlock] = {}
    phase, started = "prepare", set[str]()
    for event in events:
        if event.phase not in (phase, "recompute"):
            if phase == "prepare" or event.step >= step:
                moments[f"after {phase}"] = Moment(allocator.allocated, allocator.reserved)
            if phase == "backward":
                moments["peak"] = Moment(allocator.peak, allocator.reserved)
            if event.step == step and phase in ("prepare", "step"):
                allocator.peak = allocator.allocated
            phase = event.phase
        if event.kind == "alloc":
            alive[event.id] = allocator.allocate(event.bytes, event.stream)
        elif event.kind == "free":
            allocator.release(alive.pop(event.id))
        if event.flops and phase in ("forward", "backward") and phase not in started:
            started.add(phase)
            allocator.allocate(workspace(capability))
    moments[f"after {phase}"] = Moment(allocator.allocated, allocator.reserved)
    return moments
