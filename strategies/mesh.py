"""Where a process stands among the ranks, and with whom it shares what. Plain Python: torch is named for types only."""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that share parameters out, and where its tensors live.

    Those are all ranks, unless there are replicas: groups of ranks, each of which holds everything once. Ranks are
    numbered replica by replica.
    """

    rank: int
    """Among those that share parameters out."""
    world_size: int
    """How many they are."""
    device: "torch.device"
    group: "ProcessGroup | None" = None
    """Of these ranks; None: the default group, of all."""
    replica: int = 0
    replicas: int = 1

    @property
    def global_rank(self) -> int:
        """Among all ranks."""
        return self.replica * self.world_size + self.rank

    @property
    def ranks(self) -> int:
        """How many there are in all."""
        return self.replicas * self.world_size


@dataclass(frozen=True)
class Mesh:
    """Ranks on named axes, the outermost first: ("replicate", 2), ("shard", 4) are two groups of four neighbours."""

    sizes: tuple[tuple[str, int], ...]

    @property
    def ranks(self) -> int:
        """How many there are in all."""
        return prod(size for _, size in self.sizes)

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for axis, _ in self.sizes)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where a rank stands on every axis."""
        found = {}
        for axis, size in reversed(self.sizes):
            rank, found[axis] = divmod(rank, size)
        return found
