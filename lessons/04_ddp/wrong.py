"""Wrong attempts at lesson 4, and what their message must say."""

import torch
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


@wrong_attempt("my_rows", says="gets 24 of 24 rows")
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


@wrong_attempt("make_buckets", says="would fit too")
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


@wrong_attempt("micro_batches", says="the rows of a rank")
def rows_of_a_rank(global_rows, rows_per_forward, ranks):
    return global_rows // ranks


@wrong_attempt("micro_batches", says="more of them means fewer")
def times_ranks(global_rows, rows_per_forward, ranks):
    return global_rows * ranks // rows_per_forward


@wrong_attempt("micro_batches", says="Divide with //")
def a_float(global_rows, rows_per_forward, ranks):
    if global_rows % (rows_per_forward * ranks):
        raise ValueError
    return global_rows / (rows_per_forward * ranks)


@wrong_attempt("micro_batches", says="Raise ValueError")
def each_by_itself(global_rows, rows_per_forward, ranks):
    if global_rows % rows_per_forward or global_rows % ranks:
        raise ValueError
    return global_rows // (rows_per_forward * ranks)


@wrong_attempt("wire_bytes", says="one of the ring's two passes")
def one_pass(parameters, ranks, accumulation, no_sync):
    return (ranks - 1) / ranks * 4 * parameters * (1 if no_sync else accumulation)


@wrong_attempt("wire_bytes", says="bytes together")
def all_ranks(parameters, ranks, accumulation, no_sync):
    return 2 * (ranks - 1) * 4 * parameters * (1 if no_sync else accumulation)


@wrong_attempt("wire_bytes", says="never all of both halves")
def twice_the_gradients(parameters, ranks, accumulation, no_sync):
    return 8 * parameters * (1 if no_sync else accumulation)


@wrong_attempt("my_rows", says="whole rows are asked for")
def columns(batch, rank, world_size):
    return batch.tensor_split(world_size, dim=1)[rank]


@wrong_attempt("my_rows", says="Rank 7 of 8 gets 2 of 24 rows")
def one_further_on(batch, rank, world_size):
    rows = len(batch) // world_size
    return batch[rank * rows + 1 : (rank + 1) * rows + 1]


@wrong_attempt("my_rows", says="whole rows are asked for, as they are")
def as_floats(batch, rank, world_size):
    return batch.chunk(world_size)[rank].float()


@wrong_attempt("average_gradients", says="in place (copy_)")
def other_tensors(model):
    for p in model.parameters():
        if p.grad is not None:
            total = p.grad.clone()
            dist.all_reduce(total)
            p.grad = total / dist.get_world_size()


@wrong_attempt("average_gradients", says="times what an all-reduce of the gradients does")
def gathered_and_averaged(model):
    for p in model.parameters():
        if p.grad is not None:
            grads = [torch.empty_like(p.grad) for _ in range(dist.get_world_size())]
            dist.all_gather(grads, p.grad)
            p.grad.copy_(torch.stack(grads).mean(0))


@wrong_attempt("average_gradients", says="divided twice")
def divided_twice(model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= dist.get_world_size()
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


@wrong_attempt("average_gradients", says="nothing was averaged")
def copies_averaged(model):
    for p in model.parameters():
        if p.grad is not None:
            total = p.grad.clone()
            dist.all_reduce(total)
            total /= dist.get_world_size()


@wrong_attempt("make_buckets", says="there is an empty bucket")
def begins_with_an_empty_one(parameters, bucket_bytes):
    buckets, held = [[]], 0
    for p in reversed(parameters):
        if held + p.nbytes > bucket_bytes:
            buckets.append([])
            held = 0
        buckets[-1].append(p)
        held += p.nbytes
    return buckets


@wrong_attempt("make_buckets", says="Ask element_size()")
def always_float32(parameters, bucket_bytes):
    return _fill(parameters[::-1], bucket_bytes, lambda p: 4 * p.numel())


@wrong_attempt("make_buckets", says="would fit too")
def never_quite_full(parameters, bucket_bytes):
    return _fill(parameters[::-1], bucket_bytes - 1, lambda p: p.nbytes)


@wrong_attempt("make_buckets", says="none of the parameters")
def gradients_in_buckets(parameters, bucket_bytes):
    return [[p.grad for p in bucket] for bucket in _fill(parameters[::-1], bucket_bytes, lambda p: p.nbytes)]


@wrong_attempt("accumulate", says="One a micro-batch is due")
def all_at_once(model, batches):
    model(torch.cat(batches)).backward()


@wrong_attempt("accumulate", says="the activations of both are there at once")
def one_backward(model, batches):
    (sum(model(batch) for batch in batches) / len(batches)).backward()


@wrong_attempt("accumulate", says="Hold the all-reduce back")
def no_sync_around_backward_alone(model, batches):
    for i, batch in enumerate(batches):
        loss = model(batch) / len(batches)
        if i < len(batches) - 1:
            with model.no_sync():
                loss.backward()
        else:
            loss.backward()


@wrong_attempt("accumulate", says="DDP has averaged them already")
def summed_once_more(model, batches):
    for batch in batches[:-1]:
        with model.no_sync():
            (model(batch) / len(batches)).backward()
    (model(batches[-1]) / len(batches)).backward()
    for p in model.parameters():
        p.grad *= dist.get_world_size()


@wrong_attempt("accumulate", says="leaves the model in no_sync")
def left_in_no_sync(model, batches):
    for i, batch in enumerate(batches):
        model.require_backward_grad_sync = i == len(batches) - 1
        (model(batch) / len(batches)).backward()
    model.require_backward_grad_sync = False


@wrong_attempt("average_gradients", says="Right on 3 ranks, but on 2")
def by_three(model):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= 3


@wrong_attempt("average_gradients", says="is still this rank's own; others are averaged")
def the_last_one_forgotten(model):
    for p in [p for p in model.parameters() if p.grad is not None][:-1]:
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


@wrong_attempt("make_buckets", says="one of yours holds")
def dtype_of_the_first(parameters, bucket_bytes):
    return _fill(parameters[::-1], bucket_bytes, lambda p: p.numel() * parameters[0].element_size())
