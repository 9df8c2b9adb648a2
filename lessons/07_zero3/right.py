"""Other right solutions of lesson 7."""

import math

import torch
import torch.distributed as dist

from lessons.checking import right_attempt


@right_attempt("cut")
def own_elements_into_zeros(parameter, rank, world_size):
    part = -(-parameter.numel() // world_size)
    mine = parameter.new_zeros(part)
    there = parameter.reshape(-1)[rank * part : (rank + 1) * part]
    mine[: len(there)] = there
    return mine


@right_attempt("whole")
def broadcast_by_each(mine, shape):
    flat = mine.repeat(dist.get_world_size())
    for rank, part in enumerate(flat.chunk(dist.get_world_size())):
        dist.broadcast(part, rank)
    return flat[: math.prod(shape)].reshape(shape).clone()


@right_attempt("linear_backward")
def by_autograd_and_reduce(x, upstream, mine, shape):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    flat = torch.empty(world_size * len(mine))
    dist.all_gather(list(flat.chunk(world_size)), mine)
    weight = flat[: math.prod(shape)].view(shape).requires_grad_()
    inputs = x.detach().requires_grad_()
    (inputs @ weight.T).backward(upstream)
    padded = torch.zeros(world_size * len(mine))
    padded[: math.prod(shape)] = weight.grad.flatten() / world_size
    for owner, part in enumerate(padded.chunk(world_size)):
        dist.reduce(part, owner)
    return inputs.grad, padded.chunk(world_size)[rank].clone()
