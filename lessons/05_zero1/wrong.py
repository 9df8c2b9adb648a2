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


@wrong_attempt("rank_bytes", says="divided too")
def whole_masters(parameters, ranks):
    return 8 * parameters + 8 * parameters / ranks


@wrong_attempt("rank_bytes", says="gradients are missing: they are whole, 2 bytes each. Or: The parameters are missing")
def no_gradients(parameters, ranks):
    return 2 * parameters + 12 * parameters / ranks


@wrong_attempt("rank_bytes", says="for parameters = 1")
def in_whole_bytes(parameters, ranks):
    return 4 * parameters + 12 * parameters // ranks


@wrong_attempt("wire_bytes", says="updated parameters is missing")
def not_gathered(parameters, ranks, reduce_scatter):
    return (1 if reduce_scatter else 2) * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="That is the payload")
def payload(parameters, ranks, reduce_scatter):
    return (2 if reduce_scatter else 3) * 2 * parameters


@wrong_attempt("wire_bytes", says="two passes of the ring")
def always_two(parameters, ranks, reduce_scatter):
    return 2 * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="one pass of the ring, not two as in an all-reduce")
def gathered_by_all_reduce(parameters, ranks, reduce_scatter):
    return (3 if reduce_scatter else 4) * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="of all 6 ranks together")
def all_together(parameters, ranks, reduce_scatter):
    return (2 if reduce_scatter else 3) * (ranks - 1) * 2 * parameters


@wrong_attempt("wire_bytes", says="travel in bf16")
def in_float32(parameters, ranks, reduce_scatter):
    return (2 if reduce_scatter else 3) * (ranks - 1) / ranks * 4 * parameters


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


@wrong_attempt("pieces", says="has an empty piece")
def where_a_slice_ends(numels, rank, world_size):
    part = math.ceil(sum(numels) / (2 * world_size)) * 2
    found, offset = [], 0
    for i, numel in enumerate(numels):
        start, stop = max(rank * part - offset, 0), min((rank + 1) * part - offset, numel)
        if start <= stop:
            found.append((i, start, stop))
        offset += numel
    return found


@wrong_attempt("pieces", says="one for each parameter")
def one_by_one(numels, rank, world_size):
    whole = _cut(numels, rank, math.ceil(sum(numels) / (2 * world_size)) * 2)
    return [(i, element, element + 1) for i, start, stop in whole for element in range(start, stop)]


@wrong_attempt("pieces", says="not in order")
def from_behind(numels, rank, world_size):
    return _cut(numels, rank, math.ceil(sum(numels) / (2 * world_size)) * 2)[::-1]


@wrong_attempt("pieces", says="multiple of 2 · world_size")
def padded_to_the_ranks_alone(numels, rank, world_size):
    return _cut(numels, rank, math.ceil(sum(numels) / world_size))


@wrong_attempt("clip_norm", says="norm of this rank's slice")
def local_norm(mine):
    return mine.norm().item()


@wrong_attempt("clip_norm", says="Norms do not add up")
def sum_of_norms(mine):
    norm = mine.norm()
    dist.all_reduce(norm)
    return norm.item()


@wrong_attempt("clip_norm", says="the root is missing")
def squared(mine):
    square = mine.square().sum()
    dist.all_reduce(square)
    return square.item()


@wrong_attempt("clip_norm", says="changed `mine`")
def in_place(mine):
    square = mine.pow_(2).sum()
    dist.all_reduce(square)
    return square.sqrt().item()


@wrong_attempt("clip_norm", says="different elements of one gradient")
def slices_added(mine):
    whole = mine.clone()
    dist.all_reduce(whole)
    return whole.norm().item()


@wrong_attempt("clip_norm", says="One number of each is enough")
def all_gathered(mine):
    slices = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(slices, mine)
    return torch.cat(slices).norm().item()


@wrong_attempt("clip_norm", says="averaged over the ranks")
def averaged(mine):
    square = mine.square().sum()
    dist.all_reduce(square)
    return (square / dist.get_world_size()).sqrt().item()


@wrong_attempt("clip_norm", says="a plain number")
def a_tensor(mine):
    square = mine.square().sum()
    dist.all_reduce(square)
    return square.sqrt()


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


def _whole(mine, weights):
    gathered = torch.empty_like(weights)
    dist.all_gather(list(gathered.chunk(dist.get_world_size())), mine)
    return gathered


def _mean(gradient):
    mean = gradient.clone()
    dist.all_reduce(mean)
    return mean.div_(dist.get_world_size())


@wrong_attempt("sharded_step", says="it sends 4Ψ")
def gathered_by_all_reduce_of_zeros(weights, gradient, update):
    rank, n = dist.get_rank(), dist.get_world_size()
    new = torch.zeros_like(weights)
    new.chunk(n)[rank].copy_(update(weights.chunk(n)[rank], _mean(gradient).chunk(n)[rank]))
    dist.all_reduce(new)
    weights.copy_(new)


@wrong_attempt("sharded_step", says="`weights` another storage")
def a_new_buffer(weights, gradient, update):
    rank, n = dist.get_rank(), dist.get_world_size()
    weights.data = _whole(update(weights.chunk(n)[rank], _mean(gradient).chunk(n)[rank]), weights)


@wrong_attempt("sharded_step", says="changed `gradient`")
def the_callers_gradient(weights, gradient, update):
    rank, n = dist.get_rank(), dist.get_world_size()
    dist.all_reduce(gradient)
    gradient /= n
    weights.copy_(_whole(update(weights.chunk(n)[rank], gradient.chunk(n)[rank]), weights))


@wrong_attempt("sharded_step", says="have not changed")
def returned(weights, gradient, update):
    rank, n = dist.get_rank(), dist.get_world_size()
    return _whole(update(weights.chunk(n)[rank], _mean(gradient).chunk(n)[rank]), weights)


_KEPT = {}


@wrong_attempt("sharded_step", says="from those of one process")
def masters_of_the_first_call(weights, gradient, update):
    rank, n = dist.get_rank(), dist.get_world_size()
    mine = _KEPT.setdefault(len(weights), weights.chunk(n)[rank].clone())
    mine.copy_(update(mine, _mean(gradient).chunk(n)[rank]))
    weights.copy_(_whole(mine, weights))


@wrong_attempt("sharded_step", says="Right on 3 ranks, but on 2")
def divided_by_three(weights, gradient, update):
    mean = _mean(gradient) * dist.get_world_size() / 3
    rank, world_size = dist.get_rank(), dist.get_world_size()
    new = update(weights.chunk(world_size)[rank], mean.chunk(world_size)[rank])
    weights.copy_(_whole(new, weights))


@wrong_attempt("sharded_step", says="nothing else belongs to it")
def with_a_little_decay(weights, gradient, update):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    new = update(weights.chunk(world_size)[rank], _mean(gradient).chunk(world_size)[rank])
    weights.copy_(_whole(new, weights)).mul_(1 - 1e-6)
