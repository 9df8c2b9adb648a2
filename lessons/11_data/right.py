"""Other right solutions of lesson 11, differently built: the check must pass them."""

import itertools
import mmap

import numpy as np
import torch

from lessons.checking import right_attempt


@right_attempt("read_tokens")
def header_by_bytes(path, first, last):
    with open(path, "rb") as file:
        if int.from_bytes(file.read(4), "little") != 20240520:
            raise ValueError(f"{path} is no shard")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024 + 2 * first, shape=(last - first,))


@right_attempt("read_tokens")
def copy_on_write(path, first, last):
    whole = np.memmap(path, dtype="<u2", mode="c")
    if whole[:2].view("<i4")[0] != 20240520:
        raise ValueError("no shard")
    assert mmap.PAGESIZE
    return whole[512 + first : 512 + last]


@right_attempt("cut_rows")
def by_view(stream, length, start):
    count = (len(stream) - 1) // length
    inputs = stream[: count * length].view(count, length).clone()
    inputs[:, 0] = start
    return inputs, stream[1 : count * length + 1].reshape(count, length).clone()


@right_attempt("document_mask")
def by_loops(tokens, start):
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    first = 0
    for query, token in enumerate(tokens.tolist()):
        first = query if token == start else first
        mask[query, first : query + 1] = True
    return mask


@right_attempt("batch_rows")
def from_an_endless_order(step, rank, world_size, global_batch, rows_per_epoch, shuffled):
    endless = itertools.chain.from_iterable(map(shuffled, itertools.count()))
    size = global_batch // world_size
    first = step * global_batch + rank * size
    return list(itertools.islice(endless, first, first + size))
