"""Other right solutions of lesson 6."""

import torch
import torch.distributed as dist

from lessons.checking import right_attempt


@right_attempt("owners")
def cut_by_cut(offset, numel, part):
    found, start = [], 0
    while start < numel:
        rank, within = divmod(offset + start, part)
        stop = min(start + part - within, numel)
        found.append((rank, start, stop))
        start = stop
    return found


@right_attempt("to_owners")
def one_message_for_each_owner(gradients, owner):
    for rank in range(dist.get_world_size()):
        mine = [i for i, who in enumerate(owner) if who == rank]
        if not mine:
            continue
        message = torch.cat([gradients[i].reshape(-1) for i in mine])
        dist.reduce(message, rank)
        parts = (message / dist.get_world_size()).split([gradients[i].numel() for i in mine])
        for i, part in zip(mine, parts, strict=True):
            gradients[i] = part.view_as(gradients[i]) if rank == dist.get_rank() else None
