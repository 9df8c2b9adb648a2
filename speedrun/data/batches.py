"""Global batches: which tokens are in row i of step k, whoever asks.

Every rank computes the placement of all rows by itself, from (data, seed, step), and reads only its own rows. So the
global batch is the same for every strategy, world size and micro-batch, without a word between the ranks, and step
1000 costs no more than step 0.

**The stream.** A source is one or more parts (the text, or each shard). An epoch visits the parts in order, each
visit with the part's documents in a fresh order, every document behind its document-start token; a part that begins in
mid-document gets one there too. Epoch follows epoch: the stream never ends, and position p is found by division.

**Rows.** With T = sequence_length, row r is the T + 1 tokens of the stream from position r · T on, its first token
replaced by a document start:

    stream     S d0 d1 d2 d3 S e0 e1 ...             T = 3, S = document start
    row 0      S d0 d1 d2          inputs  S d0 d1   targets d0 d1 d2
    row 1             S d3 S e0    inputs  S d3 S    targets d3 S  e0

Rows overlap in that one token, so each token of the stream is a target exactly once, no row is padded, and a document
cut by the end of a row goes on in another row, as a document of its own. (Where the cut leaves exactly nothing, a row
begins with two document starts: an empty document.)

**Stages.** Where batch size or row length change during a run, the stream is first cut where one stage's tokens end
and the next one's begin; each stage's part is then cut into rows of its own length. So still no token comes twice.

**Order.** Neighbouring rows often come from one long document, and a batch of those says less than a mixed one. So
the rows of a stage that begin in one visit are shuffled among themselves, and then each step takes `global_batch`.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from speedrun.data.shards import Watched
from strategies.errors import UserError

SCANNED = 2**24
"""Tokens that are looked through at a time."""


@dataclass(frozen=True, eq=False)
class DocumentRun:
    """A run of documents: all of a text source, or one shard."""

    name: str
    tokens: np.ndarray  # uint16 or uint32 [tokens], at least one; a memory map for a shard
    document_start: int
    file: Watched | None = None  # what is mapped

    def read(self, first: int, last: int) -> np.ndarray:
        """Tokens [first, last). Of a file by reading it, not through the map: what was cut off meanwhile is an error.

        Raises DataChangedError where the file does not have them any more.
        """
        if self.file is None:
            return np.asarray(self.tokens[first:last])
        return self.file.read(first, min(last, len(self.tokens)), self.tokens.dtype)

    @cached_property
    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each document's text begins, without its document-start token, and its length: int64 [documents].

        Reads the whole part once (a shard of 100M tokens: a fraction of a second), when first asked.
        """
        pieces = range(0, len(self.tokens), SCANNED)
        found = [np.flatnonzero(self.read(at, at + SCANNED) == self.document_start) + at + 1 for at in pieces]
        begins = np.concatenate(found)
        if not self._opens_a_document:
            begins = np.insert(begins, 0, 0)
        ends = np.append(begins[1:] - 1, len(self.tokens))
        return begins, ends - begins

    @cached_property
    def stream_length(self) -> int:
        """Tokens in the stream: those of the part, and a document start where it begins in mid-document."""
        return len(self.tokens) + int(not self._opens_a_document)

    @cached_property
    def _opens_a_document(self) -> bool:
        return bool(self.read(0, 1)[0] == self.document_start)

    def check_vocabulary(self, tokens: np.ndarray, vocab_size: int) -> None:
        """Raise ValueError if some of `tokens`, read from this part, are not below `vocab_size`."""
        if tokens.max() >= vocab_size:
            where = int(np.argmax(self.tokens >= vocab_size))
            raise UserError(
                f"{self.name} holds token {self.tokens[where]} at position {where}, outside model.vocab_size "
                f"{vocab_size}: use data of the model's tokenizer, or raise model.vocab_size."
            )


@dataclass(frozen=True, eq=False)
class Visit:
    """One epoch's visit to one part: its place in the stream, the order of its documents and of its rows."""

    part: DocumentRun
    begin: int  # position in the stream of its first token
    order: np.ndarray  # int64 [documents]: the document that stands i-th
    ends: np.ndarray  # int64 [documents]: where the i-th one ends, relative to `begin`
    first_row: int  # the first row that begins in this visit
    row_order: np.ndarray  # int64 [rows that begin here]

    def read(self, offset: int, out: np.ndarray, vocab_size: int) -> int:
        """Copy the visit's tokens from `offset` on into `out` ([n] of its dtype) as far as the visit goes; how many."""
        out = out[: int(self.ends[-1]) - offset]
        out.fill(self.part.document_start)  # stays wherever no text is copied over it
        begins, lengths = self.part.documents
        place = int(np.searchsorted(self.ends, offset, side="right"))
        end = offset
        while end < offset + len(out):
            document, end = self.order[place], int(self.ends[place])
            text = end - int(lengths[document])  # where its text begins in the visit
            low, high = max(text, offset), min(end, offset + len(out))
            if low < high:
                source = int(begins[document]) + low - text
                out[low - offset : high - offset] = self.part.read(source, source + high - low)
            place += 1
        self.part.check_vocabulary(out, vocab_size)
        return len(out)


class Stream:
    """The endless stream of training tokens, cut into rows in a shuffled order. See the module's docstring.

    begin, end: the positions of the stream between which a stage's rows lie, a whole number of them; no end: for ever.
    """

    def __init__(
        self,
        parts: Sequence[DocumentRun],
        sequence_length: int,
        vocab_size: int,
        seed: int,
        begin: int = 0,
        end: int | None = None,
    ) -> None:
        self.parts = parts
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.seed = seed
        self.begin, self.end = begin, end
        self.part_ends = np.cumsum([part.stream_length for part in parts], dtype=np.int64)
        self.epoch_length = int(self.part_ends[-1])
        self.dtype = parts[0].tokens.dtype  # of all parts
        # A batch lies in one visit or straddles two; a row at its end may reach into a third.
        self._visit = lru_cache(maxsize=4)(self._make_visit)

    def rows(self, first: int, last: int) -> np.ndarray:
        """The rows that come first-th to (last − 1)-th in the shuffled order: [last − first, T + 1] of their dtype."""
        rows = np.empty((last - first, self.sequence_length + 1), dtype=self.dtype)
        for row, number in zip(rows, range(first, last), strict=True):
            visit = self._visit_at(self.begin + number * self.sequence_length)
            shuffled = visit.first_row + int(visit.row_order[number - visit.first_row])
            self._read(self.begin + shuffled * self.sequence_length, row)
            row[0] = visit.part.document_start
        return rows

    def _read(self, position: int, out: np.ndarray) -> None:
        """Fill `out` with the stream from `position` on."""
        filled = 0
        while filled < len(out):
            visit = self._visit_at(position + filled)
            filled += visit.read(position + filled - visit.begin, out[filled:], self.vocab_size)

    def _visit_at(self, position: int) -> Visit:
        """The visit that holds a position of the stream."""
        epoch, offset = divmod(position, self.epoch_length)
        return self._visit(epoch, int(np.searchsorted(self.part_ends, offset, side="right")))

    def _make_visit(self, epoch: int, index: int) -> Visit:
        part = self.parts[index]
        end = epoch * self.epoch_length + int(self.part_ends[index])
        begin = end - part.stream_length
        _, lengths = part.documents
        order = shuffled(len(lengths), self.seed, epoch, index, 0)
        # A row belongs to the visit in which it begins, even where it ends in the next: rows ⌈begin/T⌉ … ⌈end/T⌉ − 1.
        # Rows and stages count from the stage's begin, and its last row may stand in mid-visit.
        first, last = max(begin, self.begin), end if self.end is None else max(begin, min(end, self.end))
        first_row, last_row = (-(-(position - self.begin) // self.sequence_length) for position in (first, last))
        return Visit(
            part=part,
            begin=begin,
            order=order,
            ends=np.cumsum(lengths[order] + 1),
            first_row=first_row,
            row_order=shuffled(last_row - first_row, self.seed, epoch, index, 1),
        )


class StageRows(NamedTuple):
    """Batches from `first_step` on: so many rows of this stream."""

    first_step: int
    global_batch: int
    stream: Stream


@dataclass(frozen=True, eq=False)
class Data:
    """A source of tokens, opened: its global batches and its validation rows."""

    name: str
    """The source as the configuration names it."""
    content_hash: str
    """SHA-256 of the documents; for .bin shards of names, sizes, headers and some pages."""
    document_start: int
    """The token before each document: 256 for bytes, 50256 for GPT-2, else what the shards' sidecar says."""
    train_tokens: int
    """Tokens of an epoch, document starts included."""
    val_tokens: int
    """Tokens held out, document starts included; a validation may use fewer."""
    global_batch: int
    """Rows of a step, in the first stage."""
    validation_rows: int
    """Rows of a validation."""
    validation_length: int
    """Tokens of a validation row."""
    byte_tokens: bool
    """A token stands for a byte of text, except the document start."""
    stream: Stream
    """The training rows of the first stage."""
    validation_parts: Sequence[DocumentRun]
    """The held-out tokens."""
    later: Sequence[StageRows] = ()
    """The stages after the first, in order."""
    tokenizer_sha256: str = ""
    """Of the file of the tokenizer that made the tokens; "" where nobody said."""
    older_hash: str = ""
    """What a checkpoint of an earlier version holds for this source; "" where that is `content_hash` too."""
    note: str = ""
    """What the reader should know of the source, in a line: text that was converted or left out."""

    def stage(self, step: int) -> StageRows:
        """The stage that `step` belongs to."""
        stages = (StageRows(0, self.global_batch, self.stream), *self.later)
        return next(stage for stage in reversed(stages) if stage.first_step <= max(step, 0))

    def batch(self, step: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows [first, last) of the global batch of `step` (from 0): inputs and targets, int64 [rows, T] each.

        Raises:
            ValueError: no such step or rows; a token outside the vocabulary; a shard that has changed.
        """
        self.check_files()
        first_step, global_batch, stream = self.stage(step)
        if step < 0 or not 0 <= first <= last <= global_batch:
            raise UserError(f"There are no rows {first} to {last} at step {step} of {global_batch} rows a step.")
        before = (step - first_step) * global_batch
        rows = stream.rows(before + first, before + last)
        return _tensor(rows[:, :-1]), _tensor(rows[:, 1:])

    def about_tokens(self) -> dict[str, bool | str]:
        """For a checkpoint: what it takes to find the tokenizer again."""
        folder = "" if self.name == "pydocs" else str(Path(os.path.expanduser(self.name)).resolve())
        return {"bytes": self.byte_tokens, "tokenizer_sha256": self.tokenizer_sha256, "folder": folder}

    def check_files(self) -> None:
        """Raise DataChangedError where any shard is not what it was. Every rank looks at all, and so sees the same."""
        for part in (*self.stream.parts, *self.validation_parts):
            if part.file:
                part.file.check()

    def global_batch_hash(self, step: int) -> str:
        """SHA-256 of the whole global batch of `step`, see `batch_hash`."""
        return batch_hash(*self.batch(step, 0, self.stage(step).global_batch))

    def validation(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows [first, last) of the validation: inputs and targets, int64 [rows, T] each.

        Row i is the held-out tokens from i · T to i · T + T, both included, in the order in which they stand: each is
        a target once. A row may begin in mid-document.

        Raises:
            ValueError: no such rows; a token outside the vocabulary; a shard that has changed.
        """
        if not 0 <= first <= last <= self.validation_rows:
            raise UserError(f"There are no validation rows {first} to {last}, only {self.validation_rows} rows.")
        length = self.validation_length
        tokens = self._held_out(first * length, last * length + 1)
        return _tensor(tokens[:-1].reshape(-1, length)), _tensor(tokens[1:].reshape(-1, length))

    def target_bytes(self) -> int | None:
        """Bytes of text that the validation's targets stand for; None where the tokenizer is not known (.bin shards).

        Bits per byte = nats per token · targets / ln 2 / target bytes.
        """
        if not self.byte_tokens:
            return None
        targets = self._held_out(1, self.validation_rows * self.validation_length + 1)
        return int(np.count_nonzero(targets != self.document_start))

    def _held_out(self, begin: int, end: int) -> np.ndarray:
        """Held-out tokens [begin, end) over all validation parts: [end − begin] of their dtype."""
        self.check_files()
        pieces = []
        for part in self.validation_parts:
            piece = part.read(max(begin, 0), max(end, 0))
            if piece.size:
                part.check_vocabulary(piece, self.stream.vocab_size)
                pieces.append(piece)
            begin, end = begin - len(part.tokens), end - len(part.tokens)
        return np.concatenate(pieces)


def batch_hash(inputs: Tensor, targets: Tensor) -> str:
    """SHA-256 of inputs and then targets, as little-endian int64: to compare batches put together in different ways."""
    digest = hashlib.sha256()
    for tensor in (inputs, targets):
        digest.update(tensor.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), int64 [count], that depends on the whole numbers of `key` alone.

    It sorts raw random bits, because NumPy promises that a bit generator's stream never changes but not that
    `Generator.permutation` gives the same permutation in its next version.
    """
    return np.argsort(np.random.PCG64(key).random_raw(count), kind="stable")


def _tensor(tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))
