"""What all ranks of a check find, and fewer ranks than there are: who has written 3 where their number was meant is
found out on two.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardrun.lesson.wrong import Wrong


def of_all(value: Any) -> list[Any]:
    """Every rank's, in order. Collective."""
    every = [value] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def all_agree(words: str) -> None:
    """Raise Wrong on all ranks with what the first of them has found; nothing where none has. Collective."""
    every = of_all(words)
    if any(every):
        raise Wrong(next(f"On rank {rank}: {words}" for rank, words in enumerate(every) if words))


def on_two_ranks(run: Callable[[], None]) -> None:
    """Call run() on ranks 0 and 1, which are then all the ranks that there are; the others go on. Every rank calls it.

    What is wrong there is said to be so on two ranks.
    """
    pair, world = dist.new_group([0, 1]), dist.get_world_size()
    if dist.get_rank() > 1:
        return
    whole = distributed_c10d._world.default_pg
    distributed_c10d._world.default_pg = pair
    try:
        run()
    except Wrong as wrong:
        raise Wrong(f"Right on {world} ranks, but on 2: {wrong}") from None
    finally:
        distributed_c10d._world.default_pg = whole
