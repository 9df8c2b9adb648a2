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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from shardrun.data.roundtrip import Encoder, Loss, TokenizerError, load_tokenizer, size_and_start
from strategies.errors import UserError

if TYPE_CHECKING:
    from speedrun.data.report import TextReport
    from speedrun.data.vocabulary import Vocabulary

BATCH_BYTES = 1 << 20
"""Text that a worker is given at once: enough that the hand-over costs nothing, little enough to share out evenly."""

Named = tuple[str, bytes]
"""A document: what to call it, and its text as UTF-8."""

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
    tokens. Files get their names when all are complete. `progress` is told (bytes done, bytes in all). lossy: write the
    shards although the text does not come back out of them.

    Raises:
        ValueError: no text, or a file of it that cannot be read; shards in `out` already; a tokenizer that cannot be
            used or loses text; less than one process or token.
    """
    from speedrun.data import text
    from speedrun.data.documents import read_documents
    from speedrun.data.report import TextReport
    from speedrun.data.vocabulary import Vocabulary, write_sidecar

    if processes < 1 or shard_tokens < 1:
        raise UserError(f"{processes} processes and {shard_tokens} tokens a shard were asked for: both are at least 1.")
    if any(out.glob("*.bin")):
        raise UserError(f"{str(out)!r} holds .bin shards already: name another folder with --out, or remove them.")
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

    out.mkdir(parents=True, exist_ok=True)
    writing = _Writing(out, tokenizer, vocabulary, shard_tokens, sum(sizes.values()), progress, lossy)
    try:
        with (
            open(_unfinished(out / "held_out"), "w+b") as aside,
            ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"), _start_worker, (definition.decode(),)
            ) as pool,
        ):
            places: dict[bytes, tuple[str, int, int]] = {}
            training = _in_training(again, dict(sizes), held_out, aside, places)
            writing.write("train", 1, _in_order(pool, training, 2 * processes))
            if places.keys() != held_out.keys():
                raise UserError(CHANGED)
            held_out_bytes = sum(size for _, _, size in places.values())
            validation = _held_out(held_out, aside, places)
            writing.write("val", 0, _in_order(pool, validation, 2 * processes))
    except BaseException as error:
        for path in [*writing.shards, out / "held_out"]:
            _unfinished(path).unlink(missing_ok=True)
        if not any(out.iterdir()):
            out.rmdir()
        if isinstance(error, BrokenProcessPool):
            raise UserError("A worker process ended, perhaps for want of memory: take fewer --processes.") from error
        raise
    finally:
        _unfinished(out / "held_out").unlink(missing_ok=True)
    for path in writing.shards:
        _unfinished(path).replace(path)
    if tokenizer.resolve() != (out / "tokenizer.json").resolve():
        (out / "tokenizer.json").write_bytes(definition)
    lost = {"unknown_tokens": writing.loss.unknown, "lost_bytes": writing.loss.lost_bytes}
    of_text = {"text_bytes": sum(sizes.values()), "held_out_bytes": held_out_bytes}
    write_sidecar(out, vocabulary, documents=len(sizes), **of_text, tokens=writing.tokens, round_trip=lost)
    return Tokenized(
        sorted(writing.shards, key=lambda path: path.name.rpartition("_")[2]),
        len(sizes),
        sum(sizes.values()),
        held_out_bytes,
        any(sizes[digest] != size for digest, size in held_out.items()),
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
        out: Path,
        tokenizer: Path,
        vocabulary: "Vocabulary",
        shard_tokens: int,
        text_bytes: int,
        progress: Callable[[int, int], None],
        lossy: bool,
    ) -> None:
        self.out, self.tokenizer, self.vocabulary, self.lossy = out, tokenizer, vocabulary, lossy
        self.shard_tokens, self.text_bytes, self.progress = shard_tokens, text_bytes, progress
        self.shards: list[Path] = []
        self.tokens = 0
        self.loss = Loss()

    def write(self, kind: str, number: int, pieces: Iterable[tuple[np.ndarray, Loss]]) -> None:
        """All pieces of a kind, as shards from `number` on."""
        from speedrun.data.shards import write_tokens

        for shard in _cut(self._watched(pieces), self.shard_tokens):
            self.shards.append(self.out / f"text_{kind}_{number:06d}.bin")
            write_tokens(_unfinished(self.shards[-1]), shard, self.vocabulary)
            number += 1
            self.tokens += len(shard)

    def _watched(self, pieces: Iterable[tuple[np.ndarray, Loss]]) -> Iterator[np.ndarray]:
        try:
            for tokens, loss in pieces:
                self.loss += loss
                if self.loss and not self.lossy:
                    raise TokenizerError(
                        f"it loses text. In the first {self.loss.text_bytes:,} bytes {self.loss.in_words()}. Use one "
                        "that keeps every byte (byte-level, or with byte fallback), or accept the loss with --lossy."
                    )
                self.progress(self.loss.text_bytes, self.text_bytes)
                yield tokens
        except TokenizerError as error:
            raise UserError(f"The tokenizer {self.tokenizer} cannot be used: {error}") from error


def _in_training(
    documents: Iterable[Named],
    left: dict[bytes, int],
    held_out: dict[bytes, int],
    aside: BinaryIO,
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
            aside.write(end)
            if document:
                yield name, document
        elif digest in left and digest not in held_out:
            yield name, document
        left.pop(digest, None)
    if left:
        raise UserError(CHANGED)


def _held_out(held_out: Iterable[bytes], aside: BinaryIO, places: dict[bytes, tuple[str, int, int]]) -> Iterator[Named]:
    for digest in held_out:
        name, place, size = places[digest]
        aside.seek(place)
        yield name, aside.read(size)


def _in_order(pool: ProcessPoolExecutor, documents: Iterable[Named], ahead: int) -> Iterator[tuple[np.ndarray, Loss]]:
    """(tokens, loss) of one batch after another, at most `ahead` batches in memory."""
    waiting: deque[Future[tuple[np.ndarray, Loss]]] = deque()
    for batch in _batches(documents):
        waiting.append(pool.submit(_encode, batch))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(documents: Iterable[Named]) -> Iterator[list[Named]]:
    """The documents in batches of about BATCH_BYTES."""
    size, batch = 0, []
    for name, document in documents:
        batch.append((name, document))
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            size, batch = 0, []
    if batch:
        yield batch


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


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _start_worker(definition: str) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = Encoder(definition)


def _encode(documents: list[Named]) -> tuple[np.ndarray, Loss]:
    assert _encoder is not None
    return _encoder.encode(documents)
