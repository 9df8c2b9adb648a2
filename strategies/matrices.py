"""Whole matrices for rules that need them (Muon), out of shards, and back.

Orthogonalising a shard is not a piece of orthogonalising the matrix: the result is wrong by most of its norm. So every
matrix has one *owner* rank, on which it comes together, is transformed once, and from which the result goes back.

    sharded (FSDP, ZeRO)   a matrix in pieces:  all-to-all in, transform on the owner, all-to-all back
                           a matrix that lies whole on one rank: nothing is sent
    replicated (DDP)       gradients: reduce-scatter to the owners in place of DDP's all-reduce
                           updates:   transform on the owner, all-gather back

Pieces may lie in host memory (a strategy that offloads). What is sent and what is transformed lies on the rank's
device: NCCL moves nothing else, and products are quick there. Pieces go there and updates come back, copied once each.

Matrices go in rounds (strategies/owners.py): few messages for small matrices, and buffers that stay bounded by a round,
25 MiB or a matrix per owner. Payload per rank for M elements of matrices on W ranks: at most 2·M/W sharded;
replicated, the all-reduce's own wire bytes, since an all-reduce on a ring *is* a reduce-scatter and an all-gather.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.mesh import Place
from strategies.owners import Matrix, rounds

STACK_ELEMENTS = 2**25
"""Matrices of one shape are transformed together, up to this many elements (128 MiB in float32) at a time."""


Transform = Callable[[Tensor, list[Matrix]], Tensor]
"""[n, rows, columns] and which n matrices these are → [n, rows, columns]."""

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


def transform_local(
    matrices: Iterable[Matrix], local: dict[str, Tensor], transform: Transform, apply: Apply, place: Place
) -> None:
    """Matrices that lie whole on this rank: stack, transform, hand back."""
    for stack in stacks(matrices):
        whole = torch.stack([local[matrix.name].view(matrix.shape) for matrix in stack])
        whole = transform(whole.to(place.device), stack)
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
    transform_local((m for m in matrices if m.in_one_piece and m.owner == rank), local, transform, apply, place)
    for turn in rounds((m for m in matrices if not m.in_one_piece), place.world_size):
        mine = turn[rank]
        # In: to every owner my pieces of its matrices, from every rank its pieces of mine. My own pieces stay here.
        outgoing = [[m for m in theirs if to != rank and m.held[rank].numel] for to, theirs in enumerate(turn)]
        send = [sum(m.held[rank].numel for m in theirs) for theirs in outgoing]
        receive = [sum(m.held[of].numel for m in mine) if of != rank else 0 for of in ranks]
        incoming = _all_to_all([local[m.name] for theirs in outgoing for m in theirs], send, receive, place)
        whole = {m.name: torch.empty(m.numel, device=place.device) for m in mine}
        for of, received in enumerate(incoming):
            parts = [local[m.name] for m in mine] if of == rank else received.split([m.held[of].numel for m in mine])
            for matrix, part in zip(mine, parts, strict=True):
                whole[matrix.name][matrix.held[of].start : matrix.held[of].stop] = part
        updates: dict[str, Tensor] = {}
        transform_local(mine, whole, transform, updates.__setitem__, place)
        for matrix in mine:
            if matrix.held[rank].numel:
                apply(matrix.name, updates[matrix.name][matrix.held[rank].start : matrix.held[rank].stop])
        # Back: the same way, with the directions exchanged.
        results = [updates[m.name][m.held[of].start : m.held[of].stop] for of in ranks if of != rank for m in mine]
        returned = _all_to_all(results, receive, send, place)
        for theirs, update in zip(outgoing, returned, strict=True):
            for matrix, part in zip(theirs, update.split([m.held[rank].numel for m in theirs]), strict=True):
                apply(matrix.name, part)


def reduce_to_owners(matrices: list[Matrix], gradients: dict[str, Tensor], place: Place) -> dict[str, Tensor]:
    """DDP: the mean over ranks of every matrix's gradient, on its owner alone.

    gradients: name → this rank's own gradient, any shape. Returns the matrices that this rank owns, flat. Collective.
    """
    reduced: dict[str, Tensor] = {}
    for turn in rounds(matrices, place.world_size):
        mean = torch.empty(sum(m.numel for m in turn[place.rank]), device=place.device)
        parts = [_flat([gradients[m.name] for m in theirs], place) for theirs in turn]
        dist.reduce_scatter(mean, parts, group=place.group)
        mean.div_(place.world_size)
        reduced.update(_by_name(turn[place.rank], mean))
    return reduced


def transform_replicated(
    matrices: list[Matrix], local: dict[str, Tensor], transform: Transform, apply: Apply, place: Place
) -> None:
    """DDP: every owner transforms its matrices; every rank gets every update, whole. Collective."""
    updates: dict[str, Tensor] = {}
    transform_local((m for m in matrices if m.owner == place.rank), local, transform, updates.__setitem__, place)
    for turn in rounds(matrices, place.world_size):
        mine = _flat([updates.pop(m.name) for m in turn[place.rank]], place)
        sizes = [sum(m.numel for m in theirs) for theirs in turn]
        gathered = [
            mine if rank == place.rank else torch.empty(size, device=place.device) for rank, size in enumerate(sizes)
        ]
        if len(set(sizes)) == 1:
            gathered[place.rank] = torch.empty_like(mine)
            dist.all_gather(gathered, mine, group=place.group)
        else:  # uneven: one broadcast per owner, the same bytes on the wire
            waits = [
                dist.broadcast(part, group=place.group, async_op=True, group_src=rank)
                for rank, part in enumerate(gathered)
                if part.numel()
            ]
            for wait in waits:
                wait.wait()
        for theirs, part in zip(turn, gathered, strict=True):
            for name, update in _by_name(theirs, part).items():
                apply(name, update)


def _flat(tensors: list[Tensor], place: Place) -> Tensor:
    """Tensors end to end, on the rank's device; a single one that lies there as it is, without a copy."""
    if not tensors:
        return torch.empty(0, device=place.device)
    flat = tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
    return flat.to(place.device)


def _by_name(matrices: list[Matrix], flat: Tensor) -> dict[str, Tensor]:
    """Views of `flat`, in which these matrices lie end to end."""
    return dict(zip((m.name for m in matrices), flat.split([m.numel for m in matrices]), strict=True))


def _all_to_all(pieces: list[Tensor], send: list[int], receive: list[int], place: Place) -> list[Tensor]:
    """Exchange flat float32 pieces: send[to] elements to each rank, receive[of] from each. Returns them by rank."""
    outgoing = _flat(pieces, place)
    incoming = torch.empty(sum(receive), device=place.device)
    dist.all_to_all_single(incoming, outgoing, receive, send, group=place.group)
    return list(incoming.split(receive))
