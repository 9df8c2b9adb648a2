"""What the zoo's trainers send with: three collectives, each after a roll call, on threads or on torch.distributed.

The roll call is the tool that finds hangs. Before every collective the ranks tell each other what they are about to do.
Without it, ranks in different collectives wait for each other until a timeout of minutes, or mix up their numbers
without a word. (On a cluster TORCH_DISTRIBUTED_DEBUG=DETAIL makes torch do the same, and it costs time there too.)
"""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = 60.0
"""Seconds that a rank waits at a roll call. Only a rank that never comes to one makes the others wait so long."""


class Mismatch(RuntimeError):
    """The ranks are in different collectives; without a roll call they would hang. The message says who is where."""


class Ranks:
    """One rank's end of the collectives."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.sent: Counter[str] = Counter()
        """Collective → bytes that this rank has put on the wire, if it were a ring (lesson 3)."""

    def all_reduce(self, tensor: Tensor, what: str) -> Tensor:
        """The sum over the ranks; what: for the roll call, such as "gradients"."""
        return self._collective("all_reduce", tensor, what, 2 * (self.world_size - 1) / self.world_size)

    def reduce_scatter(self, tensor: Tensor, what: str) -> Tensor:
        """This rank's rows of the sum over the ranks; the first dimension has to divide by them."""
        return self._collective("reduce_scatter", tensor, what, (self.world_size - 1) / self.world_size)

    def all_gather(self, tensor: Tensor, what: str) -> Tensor:
        """All ranks' tensors, of one shape, one below the other."""
        return self._collective("all_gather", tensor, what, self.world_size - 1)

    def leave(self) -> None:
        """The last roll call: has everybody come to the end?"""
        self._roll_call("the end of the run", ())

    def _collective(self, name: str, tensor: Tensor, what: str, passes: float) -> Tensor:
        self._roll_call(f"{name} of {what}", tuple(tensor.shape))
        self.sent[name] += round(passes * tensor.numel() * tensor.element_size())
        return self._run(name, tensor.detach())

    def _roll_call(self, place: str, shape: tuple[int, ...]) -> None:
        places = self._exchange((place, shape))
        if any(other != places[0] for other in places):
            raise Mismatch("; ".join(f"rank {rank} is at {place}" for rank, (place, _) in enumerate(places)))

    def _exchange(self, mine: Any) -> list[Any]:
        raise NotImplementedError

    def _run(self, name: str, tensor: Tensor) -> Tensor:
        raise NotImplementedError


class Thread(Ranks):
    """Ranks that are threads of this process: no launcher, and no hang that outlives a test."""

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(table))
        self.table, self.barrier = table, barrier

    def _exchange(self, mine: Any) -> list[Any]:
        self.table[self.rank] = mine
        self.barrier.wait(PATIENCE)
        everybody = list(self.table)
        self.barrier.wait(PATIENCE)  # nobody writes anew before all have read
        return everybody

    def _run(self, name: str, tensor: Tensor) -> Tensor:
        everybody = self._exchange(tensor.clone())
        if name == "all_gather":
            return torch.cat(everybody)
        total = torch.stack(everybody).sum(0)
        return total if name == "all_reduce" else total.chunk(self.world_size)[self.rank].clone()


class Launched(Ranks):
    """Ranks that `accelerate launch` has started, in the process group that exists."""

    def __init__(self) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size())

    def _exchange(self, mine: Any) -> list[Any]:
        everybody: list[Any] = [None] * self.world_size
        dist.all_gather_object(everybody, mine)
        return everybody

    def _run(self, name: str, tensor: Tensor) -> Tensor:
        if name == "all_gather":
            result = tensor.new_empty((self.world_size * tensor.shape[0], *tensor.shape[1:]))
            dist.all_gather(list(result.chunk(self.world_size)), tensor.contiguous())
            return result
        total = tensor.clone()
        dist.all_reduce(total)  # gloo has no reduce-scatter: its result, by way of all of it
        return total if name == "all_reduce" else total.chunk(self.world_size)[self.rank].clone()


def on_threads(world_size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Run work(ranks) on every rank, each a thread; returns what they return. One's error ends all, and is raised."""
    barrier = threading.Barrier(world_size)
    table: list[Any] = [None] * world_size
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = work(Thread(rank, table, barrier))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
