"""Other right solutions of lesson 8."""

import torch
import torch.distributed as dist

from lessons.checking import right_attempt


@right_attempt("my_rows")
def row_by_row(parameter, rank, world_size):
    block = -(-len(parameter) // world_size)
    mine = [row for i, row in enumerate(parameter) if i // block == rank]
    return torch.stack(mine) if mine else parameter.new_empty(0, *parameter.shape[1:])


@right_attempt("gather_block")
def into_one_tensor(mine, rows):
    """Each parameter is a column of the ranks' messages, one below the other."""
    world_size = dist.get_world_size()
    message = torch.cat([part.reshape(-1) for part in mine])
    every = torch.empty(world_size * len(message))
    dist.all_gather_into_tensor(every, message)
    found, at = [], 0
    for part, count in zip(mine, rows, strict=True):
        own = every.view(world_size, -1)[:, at : at + part.numel()]
        found.append(own.reshape(world_size * len(part), *part.shape[1:])[:count].clone())
        at += part.numel()
    return found


@right_attempt("reduce_rows")
def sent_in_bf16_added_up_in_float32(gradient):
    """Half the bytes: an all-to-all of bf16, and the sum is made where it is needed."""
    world_size = dist.get_world_size()
    blocks = [block.contiguous() for block in gradient.chunk(world_size)]
    rank, ours = dist.get_rank(), [torch.empty_like(blocks[0]) for _ in blocks]
    for owner in range(world_size):
        dist.gather(blocks[owner], ours if owner == rank else None, owner)
    return torch.stack(ours).float().mean(0)
