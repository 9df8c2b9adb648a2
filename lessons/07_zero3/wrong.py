"""Wrong attempts at lesson 7, and what their message must say."""

import math

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from lessons.checking import wrong_attempt


@wrong_attempt("rank_bytes", says="That is ZeRO-2")
def whole_parameters(parameters, ranks):
    return 2 * parameters + 14 * parameters / ranks


@wrong_attempt("rank_bytes", says="master weights are missing")
def no_masters(parameters, ranks):
    return 12 * parameters / ranks


@wrong_attempt("rank_bytes", says="for a moment only")
def gathered_too(parameters, ranks):
    return 2 * parameters + 16 * parameters / ranks


@wrong_attempt("rank_bytes", says="That is ZeRO-1")
def optimizer_alone_divided(parameters, ranks):
    return 4 * parameters + 12 * parameters / ranks


@wrong_attempt("rank_bytes", says="cut to a whole number")
def in_whole_bytes(parameters, ranks):
    return 16 * parameters // ranks


@wrong_attempt("wire_bytes", says="That is one micro-batch")
def accumulation_ignored(parameters, ranks, accumulation, keep):
    return (2 if keep else 3) * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="gathered again for backward")
def always_kept(parameters, ranks, accumulation, keep):
    return accumulation * 2 * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="no room for whole ones")
def reduced_once(parameters, ranks, accumulation, keep):
    return (accumulation * (1 if keep else 2) + 1) * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="gathered once per micro-batch")
def never_kept(parameters, ranks, accumulation, keep):
    return accumulation * 3 * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="not gathered: every rank keeps")
def gathered_after_the_update(parameters, ranks, accumulation, keep):
    return (accumulation * (2 if keep else 3) + 1) * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="of all 6 ranks together")
def all_together(parameters, ranks, accumulation, keep):
    return accumulation * (2 if keep else 3) * (ranks - 1) * 2 * parameters


@wrong_attempt("most_gathered", says="none were let go")
def all_of_them(numels, ahead):
    return sum(numels)


@wrong_attempt("most_gathered", says="at the same time")
def the_largest(numels, ahead):
    return max(numels)


@wrong_attempt("most_gathered", says="Only neighbours")
def the_largest_ones(numels, ahead):
    return sum(sorted(numels)[-ahead - 1 :])


@wrong_attempt("most_gathered", says="one module too many")
def not_yet_freed(numels, ahead):
    return max(sum(numels[i : i + ahead + 2]) for i in range(len(numels)))


@wrong_attempt("most_gathered", says="one module too few")
def ahead_alone(numels, ahead):
    return max(sum(numels[i : i + max(ahead, 1)]) for i in range(len(numels)))


@wrong_attempt("most_gathered", says="does not go on at its beginning")
def round_the_end(numels, ahead):
    twice = numels * (ahead + 2)
    return max(sum(twice[i : i + ahead + 1]) for i in range(len(numels)))


@wrong_attempt("cut", says="Round the part up")
def rounded_down(parameter, rank, world_size):
    part = parameter.numel() // world_size
    return parameter.flatten()[rank * part : (rank + 1) * part].clone()


@wrong_attempt("cut", says="want equal parts")
def not_padded(parameter, rank, world_size):
    part = math.ceil(parameter.numel() / world_size)
    return parameter.flatten()[rank * part : (rank + 1) * part].clone()


@wrong_attempt("cut", says="flatten the parameter first")
def by_rows(parameter, rank, world_size):
    rows = math.ceil(len(parameter) / world_size)
    return parameter[rank * rows : (rank + 1) * rows].clone()


@wrong_attempt("cut", says="which add nothing to a sum")
def filled_with_anything(parameter, rank, world_size):
    part = math.ceil(parameter.numel() / world_size)
    flat = torch.empty(part * world_size)
    flat[: parameter.numel()] = parameter.flatten()
    return flat[rank * part : (rank + 1) * part].clone()


@wrong_attempt("cut", says="bfloat16 is asked for")
def always_float32(parameter, rank, world_size):
    part = math.ceil(parameter.numel() / world_size)
    flat = torch.zeros(part * world_size)
    flat[: parameter.numel()] = parameter.flatten()
    return flat[rank * part : (rank + 1) * part].clone()


@wrong_attempt("cut", says="never be freed")
def a_view(parameter, rank, world_size):
    part = math.ceil(parameter.numel() / world_size)
    flat = pad(parameter.flatten(), (0, part * world_size - parameter.numel()))
    return flat[rank * part : (rank + 1) * part]


def _gathered(mine):
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts)


@wrong_attempt("whole", says="padding at the end")
def with_padding(mine, shape):
    return _gathered(mine)


@wrong_attempt("whole", says="should be [5, 2]")
def flat(mine, shape):
    return _gathered(mine)[: math.prod(shape)]


@wrong_attempt("whole", says="in another order")
def interleaved(mine, shape):
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return torch.stack(parts, dim=1).flatten()[: math.prod(shape)].view(shape)


@wrong_attempt("whole", says="The parameter has nan")
def not_waited_for(mine, shape):
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    work = dist.all_gather(parts, mine, async_op=True)
    found = torch.cat(parts)[: math.prod(shape)].view(shape)
    work.wait()
    return found


@wrong_attempt("whole", says="not added up")
def added_up(mine, shape):
    flat = _gathered(mine)
    dist.all_reduce(flat)
    return flat[: math.prod(shape)].view(shape)


@wrong_attempt("whole", says="it sends 2 times what is needed")
def reduced_with_zeros(mine, shape):
    flat = torch.zeros(mine.numel() * dist.get_world_size(), dtype=mine.dtype)
    flat.chunk(dist.get_world_size())[dist.get_rank()].copy_(mine)
    dist.all_reduce(flat)
    return flat[: math.prod(shape)].view(shape)


@wrong_attempt("whole", says="its parts are in torch.bfloat16")
def always_float32_again(mine, shape):
    parts = [torch.empty(mine.numel()) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine.float())
    return torch.cat(parts)[: math.prod(shape)].view(shape)


def _weight(mine, shape):
    flat = _gathered(mine)
    return flat[: math.prod(shape)].view(shape), flat.numel()


@wrong_attempt("linear_backward", says="times too large")
def summed(x, upstream, mine, shape):
    weight, size = _weight(mine, shape)
    gradient, part = upstream.T @ x, torch.empty_like(mine)
    padded = pad(gradient.flatten(), (0, size - gradient.numel()))
    dist.reduce_scatter(part, list(padded.chunk(dist.get_world_size())))
    return upstream @ weight, part


@wrong_attempt("linear_backward", says="nothing was reduced")
def own_rows(x, upstream, mine, shape):
    weight, size = _weight(mine, shape)
    gradient = upstream.T @ x
    padded = pad(gradient.flatten(), (0, size - gradient.numel()))
    return upstream @ weight, padded.chunk(dist.get_world_size())[dist.get_rank()]


@wrong_attempt("linear_backward", says="an all-reduce brings")
def all_reduced(x, upstream, mine, shape):
    weight, size = _weight(mine, shape)
    gradient = upstream.T @ x / dist.get_world_size()
    dist.all_reduce(gradient)
    padded = pad(gradient.flatten(), (0, size - gradient.numel()))
    return upstream @ weight, padded.chunk(dist.get_world_size())[dist.get_rank()]


@wrong_attempt("linear_backward", says="keeps no more")
def whole_gradient(x, upstream, mine, shape):
    weight, _ = _weight(mine, shape)
    gradient = upstream.T @ x / dist.get_world_size()
    dist.all_reduce(gradient)
    return upstream @ weight, gradient


def _scattered(gradient, mine):
    part = torch.empty_like(mine)
    padded = pad(gradient.flatten(), (0, dist.get_world_size() * mine.numel() - gradient.numel()))
    dist.reduce_scatter(part, list(padded.chunk(dist.get_world_size())))
    return part / dist.get_world_size()


@wrong_attempt("linear_backward", says="changed `mine`")
def into_the_weight(x, upstream, mine, shape):
    weight, _ = _weight(mine, shape)
    mine.copy_(_scattered(upstream.T @ x, mine))
    return upstream @ weight, mine


@wrong_attempt("linear_backward", says="transposed before it is cut")
def the_other_way_round(x, upstream, mine, shape):
    weight, _ = _weight(mine, shape)
    return upstream @ weight, _scattered(x.T @ upstream, mine)


@wrong_attempt("linear_backward", says="The gradient of x is wrong")
def of_the_part_alone(x, upstream, mine, shape):
    weight = pad(mine, (0, math.prod(shape) - mine.numel())).view(shape)
    return upstream @ weight, _scattered(upstream.T @ x, mine)


@wrong_attempt("linear_backward", says="it sends 4 times the weight")
def all_gathered_gradients(x, upstream, mine, shape):
    weight, size = _weight(mine, shape)
    padded = pad((upstream.T @ x).flatten(), (0, size - math.prod(shape)))
    mean = _gathered(padded).view(dist.get_world_size(), -1).mean(0)
    return upstream @ weight, mean.chunk(dist.get_world_size())[dist.get_rank()].clone()


@wrong_attempt("whole", says="invalid output tensor list")
def of_three_parts(mine, shape):
    parts = [torch.empty_like(mine) for _ in range(3)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[: math.prod(shape)].view(shape)


@wrong_attempt("linear_backward", says="Right on 3 ranks, but on 2")
def divided_by_three(x, upstream, mine, shape):
    weight, _ = _weight(mine, shape)
    return upstream @ weight, _scattered(upstream.T @ x, mine) * dist.get_world_size() / 3


@wrong_attempt("linear_backward", says="away from the mean")
def with_a_little_decay(x, upstream, mine, shape):
    weight, _ = _weight(mine, shape)
    return upstream @ weight, _scattered(upstream.T @ x, mine) + 1e-5 * mine
