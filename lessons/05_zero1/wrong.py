"""Wrong attempts at lesson 5, and what their message must say."""

import math

import torch
import torch.distributed as dist

from lessons.checking import wrong_attempt


@wrong_attempt("rank_bytes", says="That is DDP")
def nothing_shared(parameters, ranks):
    return 16 * parameters


@wrong_attempt("rank_bytes", says="that is ZeRO-3")
def all_shared(parameters, ranks):
    return 16 * parameters / ranks


@wrong_attempt("rank_bytes", says="master weights are missing")
def no_masters(parameters, ranks):
    return 4 * parameters + 8 * parameters / ranks


@wrong_attempt("wire_bytes", says="updated parameters is missing")
def not_gathered(parameters, ranks, reduce_scatter):
    return (1 if reduce_scatter else 2) * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="That is the payload")
def payload(parameters, ranks, reduce_scatter):
    return (2 if reduce_scatter else 3) * 2 * parameters


@wrong_attempt("wire_bytes", says="two passes of the ring")
def always_two(parameters, ranks, reduce_scatter):
    return 2 * (ranks - 1) / ranks * 2 * parameters


def _cut(numels, rank, part, local=True):
    found, offset = [], 0
    for i, numel in enumerate(numels):
        start, stop = max(rank * part, offset), min((rank + 1) * part, offset + numel)
        if start < stop:
            found.append((i, start - offset, stop - offset) if local else (i, start, stop))
        offset += numel
    return found


@wrong_attempt("pieces", says="updated nowhere")
def rounded_down(numels, rank, world_size):
    return _cut(numels, rank, sum(numels) // world_size)


@wrong_attempt("pieces", says="not from the buffer's")
def of_the_buffer(numels, rank, world_size):
    return _cut(numels, rank, math.ceil(sum(numels) / (2 * world_size)) * 2, local=False)


@wrong_attempt("pieces", says="several ranks")
def all_on_all(numels, rank, world_size):
    return [(i, 0, numel) for i, numel in enumerate(numels)]


@wrong_attempt("pieces", says="cut through parameters")
def whole_parameters(numels, rank, world_size):
    return [(i, 0, numel) for i, numel in enumerate(numels) if i % world_size == rank]


@wrong_attempt("clip_norm", says="norm of this rank's slice")
def local_norm(mine):
    return mine.norm().item()


@wrong_attempt("clip_norm", says="Norms do not add up")
def sum_of_norms(mine):
    norm = mine.norm()
    dist.all_reduce(norm)
    return norm.item()


@wrong_attempt("sharded_step", says="That is DDP")
def as_ddp(weights, gradient, update):
    dist.all_reduce(gradient)
    weights.copy_(update(weights, gradient / dist.get_world_size()))


@wrong_attempt("sharded_step", says="all_reduce sums")
def summed(weights, gradient, update):
    rank, n = dist.get_rank(), dist.get_world_size()
    dist.all_reduce(gradient)
    gathered = torch.empty_like(weights)
    dist.all_gather(list(gathered.chunk(n)), update(weights.chunk(n)[rank], gradient.chunk(n)[rank]))
    weights.copy_(gathered)


@wrong_attempt("sharded_step", says="were not gathered")
def never_gathered(weights, gradient, update):
    rank, n = dist.get_rank(), dist.get_world_size()
    dist.all_reduce(gradient)
    mine = weights.chunk(n)[rank]
    mine.copy_(update(mine, gradient.chunk(n)[rank] / n))


@wrong_attempt("sharded_step", says="mean over the ranks is missing")
def never_reduced(weights, gradient, update):
    rank, n = dist.get_rank(), dist.get_world_size()
    gathered = torch.empty_like(weights)
    dist.all_gather(list(gathered.chunk(n)), update(weights.chunk(n)[rank], gradient.chunk(n)[rank]))
    weights.copy_(gathered)
