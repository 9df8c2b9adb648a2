"""Wrong attempts at lesson 6, and what their message must say."""

import torch
import torch.distributed as dist

from lessons.checking import wrong_attempt


@wrong_attempt("rank_bytes", says="That is ZeRO-1")
def whole_gradients(parameters, ranks):
    return 4 * parameters + 12 * parameters / ranks


@wrong_attempt("rank_bytes", says="that is ZeRO-3")
def all_shared(parameters, ranks):
    return 16 * parameters / ranks


@wrong_attempt("rank_bytes", says="master weights are missing")
def no_masters(parameters, ranks):
    return 2 * parameters + 10 * parameters / ranks


@wrong_attempt("rank_bytes", says="parameters are missing")
def no_parameters(parameters, ranks):
    return 14 * parameters / ranks


@wrong_attempt("rank_bytes", says="gradients are missing: the slice of them that this rank needs stays. Or: The master")
def no_gradients(parameters, ranks):
    return 2 * parameters + 12 * parameters / ranks


@wrong_attempt("rank_bytes", says="for parameters = 1")
def in_whole_bytes(parameters, ranks):
    return 2 * parameters + 14 * parameters // ranks


@wrong_attempt("wire_bytes", says="as in ZeRO-1")
def reduced_once(parameters, ranks, accumulation, to_owners):
    return (2 if to_owners else 3) * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="once a step, after the update")
def gathered_always(parameters, ranks, accumulation, to_owners):
    return accumulation * (2 if to_owners else 3) * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="two passes of the ring")
def always_to_owners(parameters, ranks, accumulation, to_owners):
    return (accumulation + 1) * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="That is the payload")
def payload(parameters, ranks, accumulation, to_owners):
    return (accumulation * (1 if to_owners else 2) + 1) * 2 * parameters


@wrong_attempt("wire_bytes", says="updated parameters is missing")
def not_gathered(parameters, ranks, accumulation, to_owners):
    return accumulation * (1 if to_owners else 2) * (ranks - 1) / ranks * 2 * parameters


@wrong_attempt("wire_bytes", says="of all 6 ranks together")
def all_together(parameters, ranks, accumulation, to_owners):
    return (accumulation * (1 if to_owners else 2) + 1) * (ranks - 1) * 2 * parameters


@wrong_attempt("most_gradients", says="as in ZeRO-1")
def never_freed(numels, mine, bucket):
    return sum(numels)


@wrong_attempt("most_gradients", says="what is left at the end")
def at_the_end(numels, mine, bucket):
    return sum(mine)


@wrong_attempt("most_gradients", says="backward made it")
def freed_before(numels, mine, bucket):
    most = kept = waiting = own = 0
    for numel, some in zip(numels, mine, strict=True):
        if waiting + numel > bucket:
            kept, waiting, own = kept + own, 0, 0
        waiting, own = waiting + numel, own + some
        most = max(most, kept + waiting)
    return most


@wrong_attempt("most_gradients", says="You forget what this rank keeps")
def nothing_kept(numels, mine, bucket):
    most = waiting = 0
    for numel in numels:
        most = max(most, waiting + numel)
        waiting = numel + (0 if waiting + numel > bucket else waiting)
    return most


@wrong_attempt("most_gradients", says="counted twice")
def apart(numels, mine, bucket):
    most = kept = waiting = 0
    for numel, own in zip(numels, mine, strict=True):
        most = max(most, kept + waiting + numel + own)
        waiting = numel + (0 if waiting + numel > bucket else waiting)
        kept += own
    return most


@wrong_attempt("most_gradients", says="fill the bucket exactly")
def full_is_too_full(numels, mine, bucket):
    most = kept = waiting = waiting_mine = 0
    for numel, own in zip(numels, mine, strict=True):
        most = max(most, kept + waiting + numel)
        if waiting + numel >= bucket:
            kept, waiting, waiting_mine = kept + waiting_mine, 0, 0
        waiting, waiting_mine = waiting + numel, waiting_mine + own
    return most


@wrong_attempt("most_gradients", says="goes in alone")
def the_large_one_does_not_wait(numels, mine, bucket):
    """One larger than the bucket is reduced at once, not when the next one comes."""
    most = kept = waiting = waiting_mine = 0
    for numel, own in zip(numels, mine, strict=True):
        most = max(most, kept + waiting + numel)
        if waiting + numel > bucket:
            kept, waiting, waiting_mine = kept + waiting_mine, 0, 0
        if numel > bucket:
            kept += own
        else:
            waiting, waiting_mine = waiting + numel, waiting_mine + own
    return most


@wrong_attempt("owners", says="not from the buffer's")
def of_the_buffer(offset, numel, part):
    ranks = range(offset // part, (offset + numel - 1) // part + 1)
    return [(r, max(r * part, offset), min((r + 1) * part, offset + numel)) for r in ranks]


@wrong_attempt("owners", says="sent to nobody")
def first_owner_alone(offset, numel, part):
    rank = offset // part
    return [(rank, 0, min((rank + 1) * part - offset, numel))]


@wrong_attempt("owners", says="has an empty piece")
def one_owner_too_many(offset, numel, part):
    ranks = range(offset // part, (offset + numel) // part + 1)
    return [(r, max(r * part - offset, 0), min((r + 1) * part - offset, numel)) for r in ranks]


@wrong_attempt("owners", says="the owners are")
def whole_to_the_first(offset, numel, part):
    return [(offset // part, 0, numel)]


@wrong_attempt("owners", says="are not in order")
def from_behind(offset, numel, part):
    ranks = range(offset // part, (offset + numel - 1) // part + 1)
    return [(r, max(r * part - offset, 0), min((r + 1) * part - offset, numel)) for r in ranks][::-1]


@wrong_attempt("owners", says="For 0 elements")
def nothing_is_something(offset, numel, part):
    ranks = range(offset // part, max(offset + numel - 1, offset) // part + 1)
    return [(r, max(r * part - offset, 0), min((r + 1) * part - offset, numel)) for r in ranks]


@wrong_attempt("to_owners", says="sends 2 times what is needed")
def all_reduced(gradients, owner):
    for i, rank in enumerate(owner):
        dist.all_reduce(gradients[i])
        gradients[i] = gradients[i] / dist.get_world_size() if rank == dist.get_rank() else None


@wrong_attempt("to_owners", says="its memory is not saved")
def nothing_freed(gradients, owner):
    for gradient, rank in zip(gradients, owner, strict=True):
        dist.reduce(gradient, rank)
        gradient /= dist.get_world_size()


@wrong_attempt("to_owners", says="times too large")
def summed(gradients, owner):
    for i, rank in enumerate(owner):
        dist.reduce(gradients[i], rank)
        if rank != dist.get_rank():
            gradients[i] = None


@wrong_attempt("to_owners", says="waits in reduce")
def owner_alone(gradients, owner):
    for i, rank in enumerate(owner):
        if rank == dist.get_rank():
            dist.reduce(gradients[i], rank)
            gradients[i] /= dist.get_world_size()
        else:
            gradients[i] = None


@wrong_attempt("to_owners", says="divided: the sum over the ranks is missing")
def never_reduced(gradients, owner):
    for i, rank in enumerate(owner):
        gradients[i] = gradients[i] / dist.get_world_size() if rank == dist.get_rank() else None


@wrong_attempt("to_owners", says="views of something larger")
def all_in_one(gradients, owner):
    flat = torch.cat([gradient.flatten() for gradient in gradients]) if gradients else torch.zeros(0)
    parts = flat.split([gradient.numel() for gradient in gradients]) if gradients else []
    for i, rank in enumerate(owner):
        dist.reduce(parts[i], rank)
        mine = rank == dist.get_rank()
        gradients[i] = parts[i].div_(dist.get_world_size()).view_as(gradients[i]) if mine else None


@wrong_attempt("to_owners", says="in place: gradients[i] = …")
def another_list(gradients, owner):
    found = []
    for gradient, rank in zip(gradients, owner, strict=True):
        dist.reduce(gradient, rank)
        found.append(gradient / dist.get_world_size() if rank == dist.get_rank() else None)
    return found


@wrong_attempt("to_owners", says="put None where one is let go")
def shortened(gradients, owner):
    for gradient, rank in zip(gradients, owner, strict=True):
        dist.reduce(gradient, rank)
    pairs = zip(gradients, owner, strict=True)
    gradients[:] = [gradient / dist.get_world_size() for gradient, rank in pairs if rank == dist.get_rank()]


@wrong_attempt("to_owners", says="Right on 3 ranks, but on 2")
def divided_by_three(gradients, owner):
    for i, rank in enumerate(owner):
        dist.reduce(gradients[i], rank)
        gradients[i] = gradients[i] / 3 if rank == dist.get_rank() else None
