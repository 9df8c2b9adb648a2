"""Text files → .bin shards, by a BPE tokenizer, over all cores.

The parent reads the documents in order and hands batches of them to worker processes; their tokens come back in the
same order, so the shards do not depend on the number of processes. Workers are started afresh (spawn) and import
nothing but tokenizers and numpy; that is why they live in this module and not in `speedrun.data`, which loads torch.

Every document is decoded again and compared: a tokenizer that loses text is refused after the first batch that shows
it, and not found out by whoever reads what a model writes.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shardrun.data.pieces import pieces
from shardrun.data.roundtrip import Encoder, Loss, TokenizerError, load_tokenizer, size_and_start
from shardrun.data.writing import Together
from shardrun.output import write_whole
from strategies.errors import UserError
from strategies.output import naming

if TYPE_CHECKING:
    from speedrun.data.report import TextReport
    from speedrun.data.vocabulary import Vocabulary

BATCH_BYTES = 1 << 20
"""Text that a worker is given at once: enough that the hand-over costs nothing, little enough to share out evenly."""

Named = tuple[str, bytes]
"""A document: what to call it, and its text as UTF-8."""

Batch = tuple[list[Named], bool]
"""Documents, or a piece of one and whether it is a further one."""

Encoded = tuple[np.ndarray, Loss, bool]
"""A batch's tokens, what of it was lost, and whether it was a further piece of a document."""

_encoder: Encoder | None = None  # a worker's


@dataclass(frozen=True)
class Tokenized:
    """What `tokenize` has written."""

    shards: list[Path]
    documents: int
    """Different ones: a copy counts once."""
    text_bytes: int
    held_out_bytes: int
    """Of the text, for validation."""
    cut: bool
    """These are the end of one document."""
    uncut: list[str]
    """Documents beyond BATCH_BYTES that were encoded whole, or in larger pieces, in more memory."""
    tokens: int
    """In all shards, document starts included."""
    vocabulary: "Vocabulary"
    report: "TextReport"
    """What became of the folder's files."""
    loss: Loss
    """What did not come back when the tokens were decoded; where it is anything, it was allowed."""


def tokenize(
    folder: Path,
    out: Path,
    tokenizer: Path,
    processes: int,
    shard_tokens: int,
    progress: Callable[[int, int], None],
    *,
    encoding: str = "",
    text_field: str = "text",
    lossy: bool = False,
) -> Tokenized:
    """Write the text below `folder` as `text_train_*.bin` and `text_val_*.bin` into `out`, with `tokens.json` and the
    tokenizer beside them.

    Which documents there are: `speedrun.data.documents`. 6 % of the bytes are held out, the same documents as where the
    trainer reads the folder as bytes (`speedrun.data.text`). Documents go over the edge of a shard of `shard_tokens`
    tokens. A document beyond 2 MB is encoded in pieces whose tokens are those of the whole (`shardrun.data.pieces`).
    Files get their names when all are complete, and after any error none is left. `progress` is told (bytes done, bytes
    in all). lossy: write the shards although the text does not come back out of them.

    Raises:
        ValueError: no text, or a file of it that cannot be read; shards in `out` already; a tokenizer that cannot be
            used or loses text; less than one process or token.
    """
    from speedrun.data import text
    from speedrun.data.documents import read_documents
    from speedrun.data.report import TextReport
    from speedrun.data.vocabulary import SIDECAR, Vocabulary, write_sidecar

    if processes < 1 or shard_tokens < 1:
        raise UserError(f"{processes} processes and {shard_tokens} tokens a shard were asked for: both are at least 1.")
    together = Together(out)
    size, start = size_and_start(load_tokenizer(tokenizer))
    definition = tokenizer.read_bytes()
    vocabulary = Vocabulary(size, start, hashlib.sha256(definition).hexdigest())

    report = TextReport()
    sizes: dict[bytes, int] = {}
    for _, document in read_documents(folder, report, encoding, text_field):
        sizes[hashlib.sha256(document).digest()] = len(document)
    report.copies = report.documents - len(sizes)
    held_out = text.choose_held_out(sizes, report.copies)
    again = read_documents(folder, TextReport(), encoding, text_field)

    with together as files:
        writing = _Writing(files, tokenizer, vocabulary, shard_tokens, sum(sizes.values()), progress, lossy)
        places: dict[bytes, tuple[str, int, int]] = {}
        aside_at = out / "held_out.part"
        with _deaf_children():
            pool = ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"), _start_worker, (definition.decode(),)
            )
        try:
            with open(aside_at, "w+b", buffering=0) as aside:
                training = _in_training(again, dict(sizes), held_out, aside, places)
                writing.write("train", 1, _in_order(pool, writing.batches(training), 2 * processes))
                if places.keys() != held_out.keys():
                    raise UserError(CHANGED)
                validation = _held_out(held_out, aside, places)
                writing.write("val", 0, _in_order(pool, writing.batches(validation), 2 * processes))
        except BrokenProcessPool as error:
            raise UserError("A worker process ended, perhaps for want of memory: take fewer --processes.") from error
        finally:
            pool.shutdown(cancel_futures=True)
            aside_at.unlink(missing_ok=True)
        held_out_bytes = sum(size for _, _, size in places.values())
        if tokenizer.resolve() != (out / "tokenizer.json").resolve():
            write_whole(files.part("tokenizer.json"), definition)
        lost = {"unknown_tokens": writing.loss.unknown, "lost_bytes": writing.loss.lost_bytes}
        of_text = {"text_bytes": sum(sizes.values()), "held_out_bytes": held_out_bytes}
        more = {**of_text, "tokens": writing.tokens, "round_trip": lost}
        with naming(out / SIDECAR):
            write_sidecar(out, vocabulary, files.part(SIDECAR).name, documents=len(sizes), **more)
    return Tokenized(
        sorted(writing.shards, key=lambda path: path.name.rpartition("_")[2]),
        len(sizes),
        sum(sizes.values()),
        held_out_bytes,
        any(sizes[digest] != size for digest, size in held_out.items()),
        writing.uncut,
        writing.tokens,
        vocabulary,
        report,
        writing.loss,
    )


CHANGED = "The text changed while it was read: leave it alone until its shards are written, and run this again."


class _Writing:
    """Shards as they are written, and what was lost on the way."""

    def __init__(
        self,
        files: Together,
        tokenizer: Path,
        vocabulary: "Vocabulary",
        shard_tokens: int,
        text_bytes: int,
        progress: Callable[[int, int], None],
        lossy: bool,
    ) -> None:
        self.files, self.tokenizer, self.vocabulary, self.lossy = files, tokenizer, vocabulary, lossy
        self.plain = load_tokenizer(tokenizer)
        self.shard_tokens, self.text_bytes, self.progress = shard_tokens, text_bytes, progress
        self.shards: list[Path] = []
        self.tokens = 0
        self.loss = Loss()
        self.uncut: list[str] = []

    def batches(self, documents: Iterable[Named]) -> Iterator[Batch]:
        """The documents in batches of about BATCH_BYTES; a larger one in pieces, each a batch."""
        size = 0
        batch: list[Named] = []
        for name, document in documents:
            if size + len(document) > 2 * BATCH_BYTES and batch:
                yield batch, False
                size, batch = 0, []
            if len(document) > 2 * BATCH_BYTES:
                yield from self._pieces(name, document)
                continue
            batch.append((name, document))
            size += len(document)
            if size >= BATCH_BYTES:
                yield batch, False
                size, batch = 0, []
        if batch:
            yield batch, False

    def _pieces(self, name: str, document: bytes) -> Iterator[Batch]:
        text = document.decode()
        length = BATCH_BYTES * len(text) // len(document)
        for number, piece in enumerate(pieces(self.plain, text, length)):
            if len(piece) > 2 * length:
                self.uncut.append(name)
            yield [(name, piece.encode())], number > 0

    def write(self, kind: str, number: int, pieces: Iterable[Encoded]) -> None:
        """All pieces of a kind, as shards from `number` on."""
        from speedrun.data.shards import write_tokens

        for shard in _cut(self._watched(pieces), self.shard_tokens):
            name = f"text_{kind}_{number:06d}.bin"
            self.shards.append(self.files.out / name)
            with naming(self.shards[-1]):
                write_tokens(self.files.part(name), shard, self.vocabulary)
            number += 1
            self.tokens += len(shard)

    def _watched(self, pieces: Iterable[Encoded]) -> Iterator[np.ndarray]:
        so_far = Loss()  # of the document that goes on
        try:
            for tokens, loss, goes_on in pieces:
                if goes_on:  # a document counts once
                    loss.changed = max(0, loss.changed - so_far.changed)
                    loss.other_form = max(0, loss.other_form - so_far.other_form)
                so_far = so_far + loss if goes_on else loss
                self.loss += loss
                if self.loss and not self.lossy:
                    raise TokenizerError(
                        f"it loses text. In the first {self.loss.text_bytes:,} bytes {self.loss.in_words()}. Use one "
                        "that keeps every byte (byte-level, or with byte fallback), or accept the loss with --lossy."
                    )
                self.progress(self.loss.text_bytes, self.text_bytes)
                yield tokens.astype(self.vocabulary.dtype)  # what it takes on the disk: a shard is made in memory
        except TokenizerError as error:
            raise UserError(f"The tokenizer {self.tokenizer} cannot be used: {error}") from error


def _in_training(
    documents: Iterable[Named],
    left: dict[bytes, int],
    held_out: dict[bytes, int],
    aside: FileIO,
    places: dict[bytes, tuple[str, int, int]],
) -> Iterator[Named]:
    """The documents to train on, each once; those held out go into the file `aside`, their names, places and sizes
    there into `places`. left: what is expected, by SHA-256; it is used up.
    """
    from speedrun.data.text import split_end

    for name, document in documents:
        digest = hashlib.sha256(document).digest()
        if digest in held_out and digest not in places:
            document, end = split_end(document, held_out[digest])
            places[digest] = name, aside.tell(), len(end)
            left_to_write = memoryview(end)
            with naming(Path(aside.name)):
                while left_to_write:
                    left_to_write = left_to_write[aside.write(left_to_write) :]
            if document:
                yield name, document
        elif digest in left and digest not in held_out:
            yield name, document
        left.pop(digest, None)
    if left:
        raise UserError(CHANGED)


def _held_out(held_out: Iterable[bytes], aside: FileIO, places: dict[bytes, tuple[str, int, int]]) -> Iterator[Named]:
    for digest in held_out:
        name, place, size = places[digest]
        aside.seek(place)
        yield name, aside.read(size)


def _in_order(pool: ProcessPoolExecutor, batches: Iterable[Batch], ahead: int) -> Iterator[Encoded]:
    """What becomes of one batch after another, at most `ahead` of them in memory."""
    waiting: deque[tuple[Future[tuple[np.ndarray, Loss]], bool]] = deque()

    def first() -> Encoded:
        future, goes_on = waiting.popleft()
        return *future.result(), goes_on

    for documents, goes_on in batches:
        with _deaf_children():
            waiting.append((pool.submit(_encode, documents, goes_on), goes_on))
        if len(waiting) >= ahead:
            yield first()
    while waiting:
        yield first()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that are started here never hear of Ctrl-C or of a terminal that closes: they end with the parent, and
    without a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cut(pieces: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """The concatenation of all pieces, in arrays of `length` (the last may be shorter)."""
    kept: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        kept.append(piece)
        count += len(piece)
        if count >= length:
            joined = np.concatenate(kept)
            whole = count - count % length
            yield from joined[:whole].reshape(-1, length)
            kept, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(kept)


def _end_with_parent() -> None:
    """A parent that was killed tells nobody."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _start_worker(definition: str) -> None:
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = Encoder(definition)


def _encode(documents: list[Named], goes_on: bool) -> tuple[np.ndarray, Loss]:
    assert _encoder is not None
    return _encoder.encode(documents, goes_on)
