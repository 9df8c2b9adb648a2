"""Wrong attempts at lesson 11, and what their message must say."""

import numpy as np
import torch

from lessons.checking import wrong_attempt


@wrong_attempt("batch_bytes", says="they are read once")
def read_twice(rows, length):
    return {"disk": 4 * rows * length, "memory": 16 * rows * length}


@wrong_attempt("batch_bytes", says="targets are a tensor of their own")
def inputs_alone(rows, length):
    return {"disk": 2 * rows * (length + 1), "memory": 8 * rows * length}


@wrong_attempt("step_ms", says="as if nothing ran beside anything")
def always_a_sum(data, copy, compute, prefetch, pinned):
    return data + copy + compute


@wrong_attempt("step_ms", says="the slower decides")
def data_for_nothing(data, copy, compute, prefetch, pinned):
    if pinned:
        return max(data, copy, compute)
    return copy + compute if prefetch else data + copy + compute


@wrong_attempt("step_ms", says="Without pinned memory")
def always_beside(data, copy, compute, prefetch, pinned):
    return max(data, copy, compute) if prefetch else data + copy + compute


def _checked(path):
    if np.fromfile(path, dtype="<i4", count=1)[0] != 20240520:
        raise ValueError(path)


@wrong_attempt("read_tokens", says="you begin in the header")
def header_forgotten(path, first, last):
    _checked(path)
    return np.memmap(path, dtype="<u2", mode="r")[first:last]


@wrong_attempt("read_tokens", says="copied into memory")
def all_of_it(path, first, last):
    _checked(path)
    return np.fromfile(path, dtype="<u2", offset=1024)[first:last]


@wrong_attempt("read_tokens", says="some are negative")
def signed(path, first, last):
    _checked(path)
    return np.memmap(path, dtype="<i2", mode="r", offset=1024)[first:last]


@wrong_attempt("read_tokens", says="has to be refused")
def anything_goes(path, first, last):
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)[first:last]


def _rows(stream, length, step, wide):
    count = (len(stream) - 1) // length
    return torch.stack([stream[r * step : r * step + wide] for r in range(count)])


@wrong_attempt("cut_rows", says="targets are the inputs themselves")
def off_by_none(stream, length, start):
    rows = _rows(stream, length, length, length)
    rows[:, 0] = start
    return rows, rows


@wrong_attempt("cut_rows", says="rows begin in mid-document")
def not_aligned(stream, length, start):
    rows = _rows(stream, length, length, length + 1)
    return rows[:, :-1], rows[:, 1:]


@wrong_attempt("cut_rows", says="rows do not overlap")
def side_by_side(stream, length, start):
    rows = stream[: len(stream) // (length + 1) * (length + 1)].view(-1, length + 1).clone()
    rows[:, 0] = start
    return rows[:, :-1], rows[:, 1:]


@wrong_attempt("cut_rows", says="Your function has changed `stream`")
def written_into_the_stream(stream, length, start):
    rows = stream.unfold(0, length + 1, length)
    rows[:, 0] = start
    return rows[:, :-1], rows[:, 1:]


@wrong_attempt("document_mask", says="looks into other documents")
def only_causal(tokens, start):
    return torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()


@wrong_attempt("document_mask", says="looks into the future")
def not_causal(tokens, start):
    document = (tokens == start).cumsum(-1)
    return document[:, None] == document[None, :]


@wrong_attempt("document_mask", says="belongs to the document that it opens")
def start_ends_a_document(tokens, start):
    document = (tokens == start).cumsum(-1) - (tokens == start).long()
    return (document[:, None] == document[None, :]).tril()


@wrong_attempt("batch_rows", says="all ranks take the same rows")
def every_rank_alike(step, rank, world_size, global_batch, rows_per_epoch, shuffled):
    size = global_batch // world_size
    return (
        [shuffled((step * size + i) // rows_per_epoch)[(step * size + i) % rows_per_epoch] for i in range(size)]
        if world_size > 1
        else _positions(range(step * global_batch, (step + 1) * global_batch), rows_per_epoch, shuffled)
    )


def _positions(positions, rows_per_epoch, shuffled):
    return [shuffled(p // rows_per_epoch)[p % rows_per_epoch] for p in positions]


@wrong_attempt("batch_rows", says="the order of the first one")
def one_order(step, rank, world_size, global_batch, rows_per_epoch, shuffled):
    size = global_batch // world_size
    first = step * global_batch + rank * size
    return _positions(range(first, first + size), rows_per_epoch, lambda epoch: shuffled(0))


@wrong_attempt("batch_rows", says="straddles two epochs")
def epoch_of_the_step(step, rank, world_size, global_batch, rows_per_epoch, shuffled):
    size = global_batch // world_size
    epoch, first = divmod(step * global_batch, rows_per_epoch)
    order = shuffled(epoch)
    return [order[(first + rank * size + i) % rows_per_epoch] for i in range(size)]


@wrong_attempt("batch_rows", says="dealt out one by one")
def round_robin(step, rank, world_size, global_batch, rows_per_epoch, shuffled):
    positions = range(step * global_batch + rank, (step + 1) * global_batch, world_size)
    return _positions(positions, rows_per_epoch, shuffled)


@wrong_attempt("batch_bytes", says="int64 takes 8 bytes")
def int32_batches(rows, length):
    return {"disk": 2 * rows * (length + 1), "memory": 8 * rows * length + 0 * length}


@wrong_attempt("batch_bytes", says="not length + 1")
def a_column_too_many(rows, length):
    return {"disk": 2 * rows * (length + 1), "memory": 16 * rows * (length + 1)}


@wrong_attempt("batch_bytes", says="the last one's target")
def a_token_too_few(rows, length):
    return {"disk": 2 * rows * length, "memory": 16 * rows * length}


@wrong_attempt("batch_bytes", says="embeddings and losses want int64")
def stays_uint16(rows, length):
    return {"disk": 2 * rows * (length + 1), "memory": 4 * rows * length}


@wrong_attempt("step_ms", says="one step ahead")
def never_beside(data, copy, compute, prefetch, pinned):
    return max(data, copy + compute) if prefetch else data + copy + compute


@wrong_attempt("step_ms", says="Nothing runs beside anything without a thread")
def always_behind(data, copy, compute, prefetch, pinned):
    return max(data, copy, compute) if pinned else max(data, copy + compute)


@wrong_attempt("read_tokens", says="bytes are read or copied")
def whole_file_for_the_magic(path, first, last):
    if np.frombuffer(path.read_bytes(), dtype="<i4", count=1)[0] != 20240520:
        raise ValueError(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)[first:last]


@wrong_attempt("read_tokens", says="writes into the shard")
def numpys_default_mode(path, first, last):
    _checked(path)
    return np.memmap(path, dtype="<u2", offset=1024)[first:last]


@wrong_attempt("read_tokens", says="another magic number, and version 1")
def version_alone(path, first, last):
    if np.fromfile(path, dtype="<i4", count=2)[1] != 1:
        raise ValueError(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)[first:last]


def _all_rows(stream, length, start, count):
    rows = torch.stack([stream[r * length : (r + 1) * length + 1] for r in range(count)])
    rows[:, 0] = start
    return rows[:, :-1], rows[:, 1:]


@wrong_attempt("cut_rows", says="stack expects each tensor to be equal size")
def one_row_too_many(stream, length, start):
    return _all_rows(stream, length, start, len(stream) // length)


@wrong_attempt("cut_rows", says="non-empty TensorList (given: stream = int64 [14], length = 13")
def last_row_lost(stream, length, start):
    return _all_rows(stream, length, start, len(range(0, len(stream) - length - 1, length)))


@wrong_attempt("cut_rows", says="int64 is asked for")
def int32_inputs(stream, length, start):
    inputs, targets = _all_rows(stream, length, start, (len(stream) - 1) // length)
    return inputs.int(), targets


@wrong_attempt("cut_rows", says="is a view of the stream")
def targets_in_the_stream(stream, length, start):
    count = (len(stream) - 1) // length
    return _all_rows(stream, length, start, count)[0], stream[1 : count * length + 1].view(count, length)


@wrong_attempt("document_mask", says="torch.bool")
def numbers_for_a_mask(tokens, start):
    document = (tokens == start).cumsum(-1)
    return (document[:, None] == document[None, :]).tril().long()


@wrong_attempt("document_mask", says="wrong way round")
def upper_triangle(tokens, start):
    document = (tokens == start).cumsum(-1)
    return (document[:, None] == document[None, :]).triu()


@wrong_attempt("batch_rows", says="in the order of the file")
def never_shuffled(step, rank, world_size, global_batch, rows_per_epoch, shuffled):
    size = global_batch // world_size
    return [(step * global_batch + rank * size + i) % rows_per_epoch for i in range(size)]


@wrong_attempt("read_tokens", says="raised ValueError")
def five_thousand_tokens(path, first, last):
    _checked(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(5000,))[first:last]


@wrong_attempt("document_mask", says="270 of them starts")
def numbered_in_eight_bits(tokens, start):
    document = (tokens == start).cumsum(-1, dtype=torch.uint8)
    return (document[:, None] == document[None, :]).tril()


@wrong_attempt("document_mask", says="may look at 0")
def a_window_of_eight(tokens, start):
    document = (tokens == start).cumsum(-1)
    return (document[:, None] == document[None, :]).tril().triu(-8)
