"""The model of torch's caching allocator against its rules worked out by hand; a whole run against a GPU's allocator is
benchmarks/gpu_books.py's part.
"""

import random
from dataclasses import dataclass

import pytest

from strategies.ledger.allocator import MIB, Allocator, AllocatorBlock, allocated, block, workspaces


@pytest.mark.parametrize(
    ("bytes", "taken"),
    [
        (4, 512),
        (513, 1024),
        (MIB, MIB),
        (768 * 768 * 4, 768 * 768 * 4),  # 2.25 MiB out of a segment of 20 MiB
        (50304 * 768 * 4, 148 * MIB),  # 147.375 MiB: not worth a split
        (4096 * 50304 * 2, 394 * MIB),  # 393 MiB: 1 MiB over is not either, more would be
        (12 * MIB + 512, 12 * MIB + 512),  # of 14 MiB, and what is left is more than 1 MiB
    ],
)
def test_a_fresh_block(bytes: int, taken: int) -> None:
    assert block(bytes) == taken == Allocator().allocate(bytes).size


def test_an_old_block_is_taken_whole_where_little_would_be_left() -> None:
    allocator = Allocator()
    three = allocator.allocate(3 * MIB)
    keep = allocator.allocate(3 * MIB)  # so that the first does not join what follows
    allocator.release(three)
    assert allocator.allocate(2 * MIB + MIB // 4).size == 3 * MIB
    assert (allocator.allocated, allocator.reserved) == (6 * MIB, 20 * MIB)
    allocator.release(keep)
    assert allocator.allocate(MIB + MIB // 2).size == MIB + MIB // 2  # out of the 17 MiB that are one again


def test_streams_and_sizes_have_pools_of_their_own() -> None:
    allocator = Allocator()
    for bytes, stream in ((512, "compute"), (512, "all_gather"), (2 * MIB, "compute"), (2 * MIB, "all_gather")):
        allocator.release(allocator.allocate(bytes, stream))
    assert (allocator.allocated, allocator.peak, allocator.reserved) == (0, 2 * MIB, 2 * (2 + 20) * MIB)


def test_nothing_is_lost_or_given_twice() -> None:
    """A thousand random requests: blocks of a segment neither overlap nor leave holes."""
    allocator, chance = Allocator(), random.Random(1)
    alive: list[AllocatorBlock] = []
    for _ in range(1000):
        if alive and chance.random() < 0.5:
            allocator.release(alive.pop(chance.randrange(len(alive))))
        else:
            alive.append(allocator.allocate(int(10 ** chance.uniform(1, 7.5)), chance.choice(("compute", "other"))))
        assert allocator.allocated == sum(block.size for block in alive)
    blocks = [*alive, *(free for pool in allocator.pools.values() for free in pool)]
    assert sum(block.size for block in blocks) == allocator.reserved
    blocks.sort(key=lambda block: (block.segment, block.offset))
    for one, next_one in zip(blocks, blocks[1:], strict=False):
        same = one.segment == next_one.segment
        assert next_one.offset == (one.offset + one.size if same else 0)


def test_cublas_keeps_two_workspaces() -> None:
    assert workspaces((9, 0)) == 67_108_864  # all that an H100 held in no category under ZeRO-3, but for rounding
    assert workspaces((8, 0)) == workspaces((8, 9)) == 2 * 8_519_680


@dataclass
class Line:
    kind: str
    id: int
    bytes: int
    phase: str
    step: int
    flops: int = 0
    stream: str = "compute"


def test_moments_of_a_log() -> None:
    lines = []
    for step in range(2):
        lines += [
            Line("alloc", 10 * step + 1, 20 * MIB, "forward", step),
            Line("compute", 0, 0, "forward", step, flops=1),
            Line("compute", 0, 0, "backward", step, flops=1),
            Line("free", 10 * step + 1, 20 * MIB, "backward", step),
            Line("alloc", 10 * step + 2, 40 * MIB, "step", step),
        ]
        lines += [Line("free", 2, 40 * MIB, "step", 1)] if step else []
    at = allocated([Line("alloc", 99, 512, "prepare", 0), *lines], 1, (9, 0))
    rest = {moment: figures.allocated - 512 for moment, figures in at.items()}
    assert rest == {
        "after prepare": 0,
        "after forward": (40 + 20 + 64) * MIB,
        "after backward": (40 + 64) * MIB,
        "peak": (40 + 20 + 64) * MIB,
        "after step": (40 + 64) * MIB,
    }
