"""Lesson 11, The data pipeline. Write the six functions; `shardrun lesson check 11` says what is right."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor


def batch_bytes(rows: int, length: int) -> dict[str, int]:
    """Bytes of a batch of `rows` rows of `length` tokens, each with its target (the token after it).

    "disk": read from a shard of uint16 tokens; "memory": inputs and targets as int64 tensors. (Rows overlap in a token,
    but each is read by itself.)
    """
    raise NotImplementedError


def step_ms(data: float, copy: float, compute: float, prefetch: bool, pinned: bool) -> float:
    """Milliseconds of a training step, in the long run.

    data: to make a batch in host memory; copy: to bring it to the GPU; compute: forward, backward and update. prefetch:
    a background thread makes the next batch meanwhile; pinned: the batch lies in page-locked memory and is copied with
    non_blocking=True one step ahead, beside the computation (never without prefetch).
    """
    raise NotImplementedError


def read_tokens(path: Path, first: int, last: int) -> np.ndarray:
    """Tokens [first, last) of a shard, uint16, as a memory map: no more of the file is read than is looked at.

    A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, …), then that
    number of little-endian uint16 tokens. Raises ValueError for a file whose first number is not the magic.
    """
    raise NotImplementedError


def cut_rows(stream: Tensor, length: int, start: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [rows, length] each, of a stream of documents, int64 [tokens].

    Every token of the stream but the first is a target once (what is left at the end and fills no row is dropped).
    Every row's first input is `start`, the token that stands before each document. The stream is left as it is, and the
    results have memory of their own; it is long enough for a row, length + 1 tokens.
    """
    raise NotImplementedError


def document_mask(tokens: Tensor, start: int) -> Tensor:
    """Where attention may look: bool [length, length], query by key, True for a key before or at the query and in the
    same document. tokens: int64 [length]; a document begins with the token `start`, which belongs to it.
    """
    raise NotImplementedError


def batch_rows(
    step: int,
    rank: int,
    world_size: int,
    global_batch: int,
    rows_per_epoch: int,
    shuffled: Callable[[int], list[int]],
) -> list[int]:
    """Which rows of the data this rank takes at this step: a pure function, without a word between the ranks.

    The steps take global_batch rows each, in the order shuffled(0), then shuffled(1), …: shuffled(epoch) is an order of
    range(rows_per_epoch). A rank takes a contiguous part of a step's rows, rank 0 the first. global_batch divides by
    world_size; rows_per_epoch may not divide by anything.
    """
    raise NotImplementedError
