"""Whole matrices for rules that need them (Muon), out of shards, and back.

Orthogonalising a shard is not a piece of orthogonalising the matrix: the result is wrong by most of its norm. So every
matrix has one *owner* rank, on which it comes together, is transformed once, and from which the result goes back.

    sharded (FSDP, ZeRO)   a matrix in pieces:  all-to-all in, transform on the owner, all-to-all back
                           a matrix that lies whole on one rank: nothing is sent
    replicated (DDP)       gradients: reduce-scatter to the owners in place of DDP's all-reduce
                           updates:   transform on the owner, all-gather back

Pieces may lie in host memory (a strategy that offloads). What is sent and what is transformed lies on the rank's
device: NCCL moves nothing else, and products are quick there. Pieces go there and updates come back, copied once each.

Sharded matrices go in rounds (strategies/owners.py): few messages for small matrices, and buffers that stay bounded by
a round, 25 MiB or a matrix per owner. Replicated ones go in banks: all of one size in one tensor, so that a bank is one
reduce-scatter and one all-gather, and the all-gather of one bank travels while the next is transformed. Payload per
rank for M elements of matrices on W ranks: at most 2·M/W sharded; replicated, the all-reduce's own wire bytes, since an
all-reduce on a ring *is* a reduce-scatter and an all-gather, and the empty places of banks that do not divide.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.mesh import Place
from strategies.owners import Bank, Matrix, banks, rounds

STACK_ELEMENTS = 2**25
"""Matrices of one shape are transformed together, up to this many elements (128 MiB in float32) at a time."""


Transform = Callable[[Tensor, list[Matrix]], Tensor]
"""[n, rows, columns] and which n matrices these are → [n, rows, columns]."""

Apply = Callable[[list[str], list[Tensor]], None]
"""Takes matrices' names and the elements of their updates that this rank wanted back, flat."""


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
        apply([matrix.name for matrix in stack], list(whole.flatten(1)))


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
        transform_local(mine, whole, transform, _into(updates), place)
        here = [matrix for matrix in mine if matrix.held[rank].numel]
        names, parts = [m.name for m in here], [updates[m.name][m.held[rank].start : m.held[rank].stop] for m in here]
        # Back: the same way, with the directions exchanged.
        results = [updates[m.name][m.held[of].start : m.held[of].stop] for of in ranks if of != rank for m in mine]
        returned = _all_to_all(results, receive, send, place)
        for theirs, update in zip(outgoing, returned, strict=True):
            names += [m.name for m in theirs]
            parts += update.split([m.held[rank].numel for m in theirs])
        apply(names, parts)


def reduce_to_owners(matrices: list[Matrix], gradients: dict[str, Tensor], place: Place) -> dict[str, Tensor]:
    """DDP: the mean over ranks of every matrix's gradient, on its owner alone.

    gradients: name → this rank's own gradient, any shape. Returns the matrices that this rank owns, flat. Collective.
    """
    reduced: dict[str, Tensor] = {}
    for bank in banks(matrices, place.world_size):
        mean = torch.empty(bank.places * bank.numel, device=place.device)
        dist.reduce_scatter_tensor(mean, _together(bank, bank.of_rank, gradients, place), group=place.group)
        mean.div_(place.world_size)
        reduced.update(zip((m.name for m in bank.of_rank[place.rank]), mean.split(bank.numel), strict=False))
    return reduced


def transform_replicated(
    matrices: list[Matrix], local: dict[str, Tensor], transform: Transform, apply: Apply, place: Place
) -> None:
    """DDP: every owner transforms its matrices; every rank gets every update, whole. Collective."""
    on_its_way: Callable[[], None] | None = None
    for bank in banks(matrices, place.world_size):
        mine, updates = bank.of_rank[place.rank], dict[str, Tensor]()
        transform_local(mine, local, transform, _into(updates), place)
        gathered = torch.empty(bank.sent, device=place.device)
        sent = _together(bank, [mine], updates, place)
        work = dist.all_gather_into_tensor(gathered, sent, group=place.group, async_op=True)
        if on_its_way:
            on_its_way()  # the bank before this one
        on_its_way = partial(_arrived, bank, gathered, work, apply)
    if on_its_way:
        on_its_way()


def _arrived(bank: Bank, gathered: Tensor, work: Any, apply: Apply) -> None:
    work.wait()
    of_rank = gathered.view(len(bank.of_rank), bank.places, bank.numel)
    parts = [
        (m.name, part)
        for theirs, here in zip(bank.of_rank, of_rank, strict=True)
        for m, part in zip(theirs, here, strict=False)
    ]
    apply([name for name, _ in parts], [part for _, part in parts])


def _together(bank: Bank, of_rank: list[list[Matrix]], tensors: dict[str, Tensor], place: Place) -> Tensor:
    """The matrices of some ranks end to end, each rank's empty places with zeros, on the rank's device."""
    pieces = []
    for theirs in of_rank:
        pieces += [tensors[matrix.name].reshape(-1) for matrix in theirs]
        if empty := bank.places - len(theirs):
            pieces.append(torch.zeros(empty * bank.numel, device=place.device))
    return torch.cat(pieces).to(place.device)


def _into(updates: dict[str, Tensor]) -> Apply:
    """Keeps updates by name."""
    return lambda names, parts: updates.update(zip(names, parts, strict=True))


def _flat(tensors: list[Tensor], place: Place) -> Tensor:
    """Tensors end to end, on the rank's device; a single one that lies there as it is, without a copy."""
    if not tensors:
        return torch.empty(0, device=place.device)
    flat = tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
    return flat.to(place.device)


def _all_to_all(pieces: list[Tensor], send: list[int], receive: list[int], place: Place) -> list[Tensor]:
    """Exchange flat float32 pieces: send[to] elements to each rank, receive[of] from each. Returns them by rank."""
    outgoing = _flat(pieces, place)
    incoming = torch.empty(sum(receive), device=place.device)
    dist.all_to_all_single(incoming, outgoing, receive, send, group=place.group)
    return list(incoming.split(receive))
