"""Wrong attempts at lesson 8, and what their message must say."""

import math

import torch
import torch.distributed as dist

from lessons.checking import wrong_attempt


@wrong_attempt("rank_bytes", says="even of float32 parameters")
def always_sixteen(parameters, ranks, strategy, precision):
    return 16 * parameters / ranks


@wrong_attempt("rank_bytes", says="FSDP keeps no master copy")
def masters_everywhere(parameters, ranks, strategy, precision):
    return (20 if precision == "fp32" else 16) * parameters / ranks


@wrong_attempt("rank_bytes", says="keeps float32 rows")
def bf16_rows(parameters, ranks, strategy, precision):
    if strategy == "fsdp":
        return (16 if precision == "fp32" else 12) * parameters / ranks
    return (20 if precision == "fp32" else 16) * parameters / ranks


@wrong_attempt("rank_bytes", says="2 bytes each")
def zero3_in_float32_always(parameters, ranks, strategy, precision):
    return (16 if strategy == "fsdp" else 20) * parameters / ranks


@wrong_attempt("rank_bytes", says="The gradients are missing. Or: The parameters are missing. Or: One of AdamW's")
def no_gradients(parameters, ranks, strategy, precision):
    width = 2 if precision == "bf16" and strategy == "zero3" else 4
    each = 20 if strategy == "zero3" and precision == "fp32" else 16
    return (each - width) * parameters / ranks


@wrong_attempt("rank_bytes", says="exists gathered only")
def with_a_bf16_copy(parameters, ranks, strategy, precision):
    if strategy == "fsdp":
        return (16 if precision == "fp32" else 18) * parameters / ranks
    return (20 if precision == "fp32" else 16) * parameters / ranks


def _wire(blocks, root, ranks, gathers, reductions, width=4):
    return (ranks - 1) / ranks * (2 * (gathers[0] * blocks + gathers[1] * root) + width * reductions * (blocks + root))


@wrong_attempt("wire_bytes", says="at the last micro-batch only")
def always_reduced(blocks, root, ranks, accumulation, reshard):
    gathers = accumulation * (2 if reshard else 1), accumulation
    return _wire(blocks, root, ranks, gathers, accumulation)


@wrong_attempt("wire_bytes", says="and keeps them")
def root_twice(blocks, root, ranks, accumulation, reshard):
    times = accumulation * (2 if reshard else 1)
    return _wire(blocks, root, ranks, (times, times), 1)


@wrong_attempt("wire_bytes", says="4 bytes, not 2")
def reduced_in_bf16(blocks, root, ranks, accumulation, reshard):
    gathers = accumulation * (2 if reshard else 1), accumulation
    return _wire(blocks, root, ranks, gathers, 1, width=2)


@wrong_attempt("wire_bytes", says="gathered again for backward")
def never_resharded(blocks, root, ranks, accumulation, reshard):
    return _wire(blocks, root, ranks, (accumulation, accumulation), 1)


@wrong_attempt("wire_bytes", says="an all-reduce would be two")
def all_reduced(blocks, root, ranks, accumulation, reshard):
    return _wire(blocks, root, ranks, (accumulation * (2 if reshard else 1), accumulation), 2)


@wrong_attempt("wire_bytes", says="The root is missing")
def no_root(blocks, root, ranks, accumulation, reshard):
    return _wire(blocks, 0, ranks, (accumulation * (2 if reshard else 1), accumulation), 1)


@wrong_attempt("part_elements", says="Rows are not cut")
def both_by_elements(rows, columns, ranks):
    part = math.ceil(rows * columns / ranks)
    return {"fsdp": part, "zero3": part}


@wrong_attempt("part_elements", says="ZeRO-3 knows no rows")
def both_by_rows(rows, columns, ranks):
    part = math.ceil(rows / ranks) * columns
    return {"fsdp": part, "zero3": part}


@wrong_attempt("part_elements", says="You round down")
def rounded_down_rows(rows, columns, ranks):
    return {"fsdp": rows // ranks * columns, "zero3": math.ceil(rows * columns / ranks)}


@wrong_attempt("part_elements", says="of a matrix of 257 × 128 on 8 ranks. That is the whole matrix with its padding")
def of_all_ranks(rows, columns, ranks):
    return {"fsdp": math.ceil(rows / ranks) * ranks * columns, "zero3": math.ceil(rows * columns / ranks) * ranks}


@wrong_attempt("part_elements", says="Columns are cut there")
def by_columns(rows, columns, ranks):
    return {"fsdp": rows * math.ceil(columns / ranks), "zero3": math.ceil(rows * columns / ranks)}


@wrong_attempt("my_rows", says="are lost")
def rounded_down(parameter, rank, world_size):
    block = len(parameter) // world_size
    return parameter[rank * block : (rank + 1) * block].clone()


@wrong_attempt("my_rows", says="padding is no row")
def padded(parameter, rank, world_size):
    block = math.ceil(len(parameter) / world_size)
    whole = torch.zeros(block * world_size, *parameter.shape[1:])
    whole[: len(parameter)] = parameter
    return whole[rank * block : (rank + 1) * block].clone()


@wrong_attempt("my_rows", says="full blocks of")
def spread_evenly(parameter, rank, world_size):
    return parameter.tensor_split(world_size)[rank].clone()


@wrong_attempt("my_rows", says="can then never be freed")
def a_view(parameter, rank, world_size):
    block = math.ceil(len(parameter) / world_size)
    return parameter[rank * block : (rank + 1) * block]


@wrong_attempt("my_rows", says="A view without rows holds it as well")
def a_view_where_nothing_is_left(parameter, rank, world_size):
    block = math.ceil(len(parameter) / world_size)
    mine = parameter[rank * block : (rank + 1) * block]
    return mine.clone() if len(mine) else mine


@wrong_attempt("my_rows", says="bfloat16 is asked for")
def in_float32(parameter, rank, world_size):
    block = math.ceil(len(parameter) / world_size)
    return parameter[rank * block : (rank + 1) * block].float().clone()


@wrong_attempt("my_rows", says="list index out of range")
def chunks(parameter, rank, world_size):
    return list(parameter.chunk(world_size))[rank].clone()


def _gathered(part):
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)


@wrong_attempt("gather_block", says="3 collectives were called")
def one_by_one(mine, rows):
    return [_gathered(part)[:count] for part, count in zip(mine, rows, strict=True)]


@wrong_attempt("gather_block", says="Split every message by parameters")
def split_as_one(mine, rows):
    flat = _gathered(torch.cat([part.flatten() for part in mine]))
    wholes = flat.split([part.numel() * dist.get_world_size() for part in mine])
    return [whole.view(-1, *part.shape[1:])[:count] for whole, part, count in zip(wholes, mine, rows, strict=True)]


@wrong_attempt("gather_block", says="cut off the padding")
def with_padding(mine, rows):
    message = torch.cat([part.flatten() for part in mine])
    lines = _gathered(message).view(dist.get_world_size(), -1)
    pieces = lines.split([part.numel() for part in mine], dim=1)
    return [piece.reshape(-1, *part.shape[1:]) for piece, part in zip(pieces, mine, strict=True)]


def _sorted_out(message, mine, rows):
    """From all ranks' messages, in one tensor, to the whole parameters."""
    lines = message.view(dist.get_world_size(), -1).split([part.numel() for part in mine], dim=1)
    wholes = [line.reshape(-1, *part.shape[1:]) for line, part in zip(lines, mine, strict=True)]
    return [whole[:count] for whole, count in zip(wholes, rows, strict=True)]


@wrong_attempt("gather_block", says="rounded to bf16")
def gathered_in_bf16(mine, rows):
    message = _gathered(torch.cat([part.flatten() for part in mine]).bfloat16())
    return _sorted_out(message.float(), mine, rows)


@wrong_attempt("gather_block", says="are the ranks in order?")
def last_rank_first(mine, rows):
    message = _gathered(torch.cat([part.flatten() for part in mine]))
    return _sorted_out(message.view(dist.get_world_size(), -1).flip(0), mine, rows)


@wrong_attempt("gather_block", says="sends 2 times what is needed")
def reduced_with_zeros(mine, rows):
    message = torch.cat([part.flatten() for part in mine])
    every = torch.zeros(dist.get_world_size(), len(message))
    every[dist.get_rank()] = message
    dist.all_reduce(every)
    return _sorted_out(every, mine, rows)


@wrong_attempt("gather_block", says="changed `mine`")
def into_the_list(mine, rows):
    message = _gathered(torch.cat([part.flatten() for part in mine]))
    mine[:] = _sorted_out(message, mine, rows)
    return mine


def _reduced(gradient):
    parts = list(gradient.chunk(dist.get_world_size()))
    reduced = torch.empty_like(parts[0])
    dist.reduce_scatter(reduced, parts)
    return reduced


@wrong_attempt("reduce_rows", says="before the reduction, not after it")
def in_bf16(gradient):
    return _reduced(gradient).float() / dist.get_world_size()


@wrong_attempt("reduce_rows", says="times too large")
def summed(gradient):
    return _reduced(gradient.float())


@wrong_attempt("reduce_rows", says="keeps its own block")
def all_rows(gradient):
    whole = gradient.float()
    dist.all_reduce(whole)
    return whole / dist.get_world_size()


@wrong_attempt("reduce_rows", says="float32 is asked for")
def back_to_bf16(gradient):
    return (_reduced(gradient.float()) / dist.get_world_size()).bfloat16()


@wrong_attempt("reduce_rows", says="sends 2 times what is needed")
def all_reduced_in_float32(gradient):
    whole = gradient.float()
    dist.all_reduce(whole)
    return whole.chunk(dist.get_world_size())[dist.get_rank()] / dist.get_world_size()


@wrong_attempt("reduce_rows", says="nothing was reduced")
def own_rows(gradient):
    return gradient.chunk(dist.get_world_size())[dist.get_rank()].float()


@wrong_attempt("reduce_rows", says="before the reduction, not after it")
def divided_in_bf16(gradient):
    return _reduced((gradient / dist.get_world_size()).float())


@wrong_attempt("gather_block", says="invalid output tensor list")
def of_three_messages(mine, rows):
    message = torch.cat([part.flatten() for part in mine])
    messages = [torch.empty_like(message) for _ in range(3)]
    dist.all_gather(messages, message)
    return _sorted_out(torch.cat(messages), mine, rows)


@wrong_attempt("reduce_rows", says="Right on 3 ranks, but on 2")
def divided_by_three(gradient):
    return _reduced(gradient.float()) / 3
