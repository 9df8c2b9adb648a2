"""Wrong attempts at lesson 4, and what their message must say."""

import torch.distributed as dist

from lessons.checking import wrong_attempt


@wrong_attempt("micro_batches", says="divide by the ranks too")
def ranks_forgotten(global_rows, rows_per_forward, ranks):
    if global_rows % (rows_per_forward * ranks):
        raise ValueError
    return global_rows // rows_per_forward


@wrong_attempt("micro_batches", says="Raise ValueError")
def rounded_down(global_rows, rows_per_forward, ranks):
    return global_rows // (rows_per_forward * ranks)


@wrong_attempt("wire_bytes", says="once a step")
def no_sync_ignored(parameters, ranks, accumulation, no_sync):
    return accumulation * 2 * (ranks - 1) / ranks * 4 * parameters


@wrong_attempt("wire_bytes", says="That is the payload")
def payload(parameters, ranks, accumulation, no_sync):
    return 4 * parameters * (1 if no_sync else accumulation)


@wrong_attempt("wire_bytes", says="every backward pass")
def always_once(parameters, ranks, accumulation, no_sync):
    return 2 * (ranks - 1) / ranks * 4 * parameters


@wrong_attempt("my_rows", says="the same rows")
def first_rows(batch, rank, world_size):
    return batch[: len(batch) // world_size]


@wrong_attempt("my_rows", says="gets 12 of 12 rows")
def all_rows(batch, rank, world_size):
    return batch


@wrong_attempt("my_rows", says="on no rank")
def overlapping(batch, rank, world_size):
    rows = len(batch) // world_size
    return batch[rank : rank + rows]


@wrong_attempt("average_gradients", says="times too large")
def summed(model):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)


@wrong_attempt("average_gradients", says="Your function has changed layers.0.weight of `model`")
def parameters_for_gradients(model):
    for p in model.parameters():
        dist.all_reduce(p.data)
        p.data /= dist.get_world_size()


@wrong_attempt("average_gradients", says="sum over the ranks is missing")
def only_divided(model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= dist.get_world_size()


@wrong_attempt("average_gradients", says="waits in all_reduce")
def rank_0_alone(model):
    for p in model.parameters():
        if p.grad is not None and dist.get_rank() == 0:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def _fill(parameters, limit, size):
    buckets, held = [], 0
    for p in parameters:
        if not buckets or held + size(p) > limit:
            buckets.append([])
            held = 0
        buckets[-1].append(p)
        held += size(p)
    return buckets


@wrong_attempt("make_buckets", says="in reverse")
def models_order(parameters, bucket_bytes):
    return _fill(parameters, bucket_bytes, lambda p: 4 * p.numel())


@wrong_attempt("make_buckets", says="elements for bytes")
def elements_for_bytes(parameters, bucket_bytes):
    return _fill(parameters[::-1], bucket_bytes, lambda p: p.numel())


@wrong_attempt("make_buckets", says="in no bucket")
def last_one_lost(parameters, bucket_bytes):
    return _fill(parameters[::-1], bucket_bytes, lambda p: 4 * p.numel())[:-1]


@wrong_attempt("make_buckets", says="fill each")
def one_each(parameters, bucket_bytes):
    return [[p] for p in reversed(parameters)]


@wrong_attempt("accumulate", says="times too large")
def not_divided(model, batches):
    for batch in batches[:-1]:
        with model.no_sync():
            model(batch).backward()
    model(batches[-1]).backward()


@wrong_attempt("accumulate", says="Hold the all-reduce back")
def always_reduced(model, batches):
    for batch in batches:
        (model(batch) / len(batches)).backward()


@wrong_attempt("accumulate", says="no all-reduce took place")
def never_reduced(model, batches):
    with model.no_sync():
        for batch in batches:
            (model(batch) / len(batches)).backward()


@wrong_attempt("accumulate", says="Only the last micro-batch")
def cleared_between(model, batches):
    for batch in batches:
        model.zero_grad()
        (model(batch) / len(batches)).backward()
