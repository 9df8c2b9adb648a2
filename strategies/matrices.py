"""Whole matrices for rules that need them (Muon), out of shards, and back.

Orthogonalising a shard is not a piece of orthogonalising the matrix: the result is wrong by most of its norm. So every
matrix has one *owner* rank, on which it comes together, is transformed once, and from which the result goes back.

    sharded (FSDP, ZeRO)   a matrix in pieces:  all-to-all in, transform on the owner, all-to-all back
                           a matrix that lies whole on one rank: nothing is sent
    replicated (DDP)       gradients: reduce-scatter to the owners in place of DDP's all-reduce
                           updates:   transform on the owner, all-gather back

Matrices go in rounds of at most one per owner, which bounds the buffers to a matrix or two per rank. Payload per rank
for M elements of matrices on W ranks: at most 2·M/W sharded; replicated, the all-reduce's own wire bytes, since an
all-reduce on a ring *is* a reduce-scatter and an all-gather.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.owners import Matrix, rounds

STACK_ELEMENTS = 2**25
"""Matrices of one shape are transformed together, up to this many elements (128 MiB in float32) at a time."""


Transform = Callable[[Tensor], Tensor]
"""[n, rows, columns] → [n, rows, columns]."""

Apply = Callable[[str, Tensor], None]
"""Takes a matrix's name and the elements of its update that this rank wanted back, flat."""


def stacks(matrices: Iterable[Matrix]) -> Iterator[list[Matrix]]:
    """Matrices of equal shape together, at most STACK_ELEMENTS elements (or one matrix) at a time."""
    by_shape = sorted(matrices, key=lambda matrix: matrix.shape)
    for _, group in itertools.groupby(by_shape, key=lambda matrix: matrix.shape):
        alike = list(group)
        count = max(1, STACK_ELEMENTS // alike[0].numel)
        for first in range(0, len(alike), count):
            yield alike[first : first + count]


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks, and where its tensors live."""

    rank: int
    world_size: int
    device: torch.device


def transform_local(matrices: Iterable[Matrix], local: dict[str, Tensor], transform: Transform, apply: Apply) -> None:
    """Matrices that lie whole on this rank: stack, transform, hand back."""
    for stack in stacks(matrices):
        whole = transform(torch.stack([local[matrix.name].view(matrix.shape) for matrix in stack]))
        for matrix, update in zip(stack, whole, strict=True):
            apply(matrix.name, update.reshape(-1))


def transform_sharded(
    matrices: list[Matrix], local: dict[str, Tensor], transform: Transform, apply: Apply, place: Place
) -> None:
    """Transform matrices of which every rank holds `held[rank]`, and hand every rank its part of the result.

    local: name → this rank's elements, flat (empty where it holds none). `apply` is called once for each non-empty
    part. Collective: all ranks call it with the same matrices.
    """
    rank, ranks = place.rank, range(place.world_size)
    transform_local((m for m in matrices if m.in_one_piece and m.owner == rank), local, transform, apply)
    for turn in rounds((m for m in matrices if not m.in_one_piece), place.world_size):
        mine = turn[rank]
        # In: to every owner my piece of its matrix, from every rank its piece of mine. My own piece stays here.
        outgoing = {to: matrix for to, matrix in enumerate(turn) if matrix and to != rank and matrix.held[rank].numel}
        send = [outgoing[to].held[rank].numel if to in outgoing else 0 for to in ranks]
        receive = [mine.held[of].numel if mine and of != rank else 0 for of in ranks]
        incoming = _all_to_all([local[matrix.name] for matrix in outgoing.values()], send, receive, place)
        results = []
        if mine:
            whole = torch.empty(mine.numel, device=place.device)
            incoming[rank] = local[mine.name]
            for part, interval in zip(incoming, mine.held, strict=True):
                whole[interval.start : interval.stop] = part
            update = transform(whole.view(1, *mine.shape)).reshape(-1)
            if mine.held[rank].numel:
                apply(mine.name, update[mine.held[rank].start : mine.held[rank].stop])
            results = [update[part.start : part.stop] for of, part in enumerate(mine.held) if of != rank]
        # Back: the same way, with the directions exchanged.
        returned = _all_to_all(results, receive, send, place)
        for to, matrix in outgoing.items():
            apply(matrix.name, returned[to])


def reduce_to_owners(matrices: list[Matrix], gradients: dict[str, Tensor], place: Place) -> dict[str, Tensor]:
    """DDP: the mean over ranks of every matrix's gradient, on its owner alone.

    gradients: name → this rank's own gradient, any shape. Returns the matrices that this rank owns, flat. Collective.
    """
    reduced = {}
    for turn in rounds(matrices, place.world_size):
        pieces = [gradients[m.name].reshape(-1) if m else torch.empty(0, device=place.device) for m in turn]
        pieces += [torch.empty(0, device=place.device)] * (place.world_size - len(pieces))
        mean = torch.empty_like(pieces[place.rank])
        dist.reduce_scatter(mean, pieces)
        if (mine := turn[place.rank]) is not None:
            reduced[mine.name] = mean.div_(place.world_size)
    return reduced


def transform_replicated(
    matrices: list[Matrix], local: dict[str, Tensor], transform: Transform, apply: Apply, place: Place
) -> None:
    """DDP: every owner transforms its matrices; every rank gets every update, whole. Collective."""
    updates: dict[str, Tensor] = {}
    transform_local((m for m in matrices if m.owner == place.rank), local, transform, updates.__setitem__)
    for turn in rounds(matrices, place.world_size):
        present = [matrix for matrix in turn if matrix]
        if len(present) == place.world_size and len({matrix.numel for matrix in present}) == 1:
            gathered = [torch.empty(matrix.numel, device=place.device) for matrix in present]
            dist.all_gather(gathered, updates.pop(present[place.rank].name))
        else:  # uneven: one broadcast per owner, the same bytes on the wire
            gathered = [
                updates.pop(matrix.name)
                if matrix.owner == place.rank
                else torch.empty(matrix.numel, device=place.device)
                for matrix in present
            ]
            waits = [
                dist.broadcast(whole, matrix.owner, async_op=True)
                for whole, matrix in zip(gathered, present, strict=True)
            ]
            for wait in waits:
                wait.wait()
        for matrix, update in zip(present, gathered, strict=True):
            apply(matrix.name, update)


def _all_to_all(pieces: list[Tensor], send: list[int], receive: list[int], place: Place) -> list[Tensor]:
    """Exchange flat float32 pieces: send[to] elements to each rank, receive[of] from each. Returns what came, by
    rank.
    """
    outgoing = torch.cat(pieces) if pieces else torch.empty(0, device=place.device)
    incoming = torch.empty(sum(receive), device=place.device)
    dist.all_to_all_single(incoming, outgoing, receive, send)
    return list(incoming.split(receive))
