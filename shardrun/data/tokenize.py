"""Text files → .bin shards, by a BPE tokenizer, over all cores.

The parent reads the documents in order and hands batches of them to worker processes; their tokens come back in the
same order, so the shards do not depend on the number of processes. Workers are started afresh (spawn) and import
nothing but tokenizers and numpy; that is why they live in this module and not in `speedrun.data`, which loads torch.
"""

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DOCUMENT_START = 50256
"""GPT-2's <|endoftext|>, which the trainer expects before each document of a shard."""

BATCH_BYTES = 1 << 20
"""Text that a worker is given at once: enough that the hand-over costs nothing, little enough to share out evenly."""

_tokenizer: Any = None  # a worker's


@dataclass(frozen=True)
class Tokenized:
    """What `tokenize` has written."""

    shards: list[Path]
    documents: int
    text_bytes: int
    tokens: int
    """In all shards, document starts included."""


def load_tokenizer(path: Path) -> Any:
    """Read a tokenizer file (`tokenizer.json`) for text as it is: nothing cut, nothing padded, no special tokens.

    Text that spells a special token ("<|endoftext|>") becomes ordinary tokens, or it would begin a document of its own.

    Raises:
        ValueError: no tokenizer file, or one whose tokens of text reach 50256.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{path} is no tokenizer file in the form of tokenizer.json ({error}).") from error
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    largest = max(set(tokenizer.get_vocab().values()) - special, default=0)
    if largest >= DOCUMENT_START:
        raise ValueError(
            f"Tokenizer {path} has tokens of text up to {largest}, but in a shard they must be below {DOCUMENT_START}, "
            "which begins a document: use GPT-2's or a smaller one."
        )
    return _for_plain_text(tokenizer)


def tokenize(
    folder: Path, out: Path, tokenizer: Path, processes: int, shard_tokens: int, progress: Callable[[int, int], None]
) -> Tokenized:
    """Write the text files below `folder` as `text_train_*.bin` and `text_val_*.bin` into `out`.

    One file is one document; 6 % of the bytes are held out, the same documents as where the trainer reads the folder as
    bytes (`speedrun.data.text`). Documents go over the edge of a shard of `shard_tokens` tokens. Files get their names
    when all are complete; the tokenizer file is put beside them. `progress` is told (bytes done, bytes in all).

    Raises:
        ValueError: no text, shards in `out` already, a tokenizer that cannot be used, less than one process or token.
    """
    from speedrun.data import text
    from speedrun.data.shards import write_tokens

    if processes < 1 or shard_tokens < 1:
        raise ValueError(
            f"{processes} processes and {shard_tokens} tokens a shard were asked for: both are at least 1."
        )
    if any(out.glob("*.bin")):
        raise ValueError(f"{str(out)!r} holds .bin shards already: name another folder with --out, or remove them.")
    load_tokenizer(tokenizer)
    paths: dict[bytes, Path] = {}
    sizes: dict[bytes, int] = {}
    for path in text.text_files(folder):
        document = text.read_document(path)
        if document:
            digest = hashlib.sha256(document).digest()
            paths.setdefault(digest, path)
            sizes[digest] = len(document)
    if not sizes:
        raise ValueError(f"{str(folder)!r} holds no text file with anything in it: put text files there.")
    held_out = text.choose_held_out(sizes)
    total, done, written, tokens = sum(sizes.values()), 0, [], 0

    def texts(digests: Iterable[bytes]) -> Iterator[str]:
        return (text.read_document(paths[digest]).decode() for digest in digests)

    out.mkdir(parents=True, exist_ok=True)
    definition = tokenizer.read_text(encoding="utf-8")
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (definition,)) as pool:
        parts = (("val", 0, held_out), ("train", 1, (digest for digest in sizes if digest not in held_out)))
        for kind, number, digests in parts:

            def encoded(digests: Iterable[bytes] = digests) -> Iterator[np.ndarray]:
                nonlocal done
                for read, piece in _in_order(pool, texts(digests), 2 * processes):
                    done += read
                    progress(done, total)
                    yield piece

            for shard in _cut(encoded(), shard_tokens):
                written.append(out / f"text_{kind}_{number:06d}.bin")
                write_tokens(_unfinished(written[-1]), shard)
                number += 1
                tokens += len(shard)
    for path in written:
        _unfinished(path).replace(path)
    if tokenizer.resolve() != (out / "tokenizer.json").resolve():
        (out / "tokenizer.json").write_text(definition, encoding="utf-8")
    return Tokenized(written, len(sizes), total, tokens)


def _in_order(pool: ProcessPoolExecutor, texts: Iterable[str], ahead: int) -> Iterator[tuple[int, np.ndarray]]:
    """(bytes of text, their tokens) of one batch after another, at most `ahead` batches in memory."""
    waiting: deque[tuple[int, Future[np.ndarray]]] = deque()
    for size, batch in _batches(texts):
        waiting.append((size, pool.submit(_encode, batch)))
        if len(waiting) >= ahead:
            size, future = waiting.popleft()
            yield size, future.result()
    for size, future in waiting:
        yield size, future.result()


def _batches(texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The texts in batches of about BATCH_BYTES, each with its size in bytes of UTF-8."""
    size, batch = 0, []
    for document in texts:
        batch.append(document)
        size += len(document.encode())
        if size >= BATCH_BYTES:
            yield size, batch
            size, batch = 0, []
    if batch:
        yield size, batch


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


def _for_plain_text(tokenizer: Any) -> Any:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "as ordinary text", in spite of its name
    return tokenizer


def _start_worker(definition: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    from tokenizers import Tokenizer

    _tokenizer = _for_plain_text(Tokenizer.from_str(definition))


def _encode(documents: list[str]) -> np.ndarray:
    """The documents' tokens, uint16, with DOCUMENT_START before each."""
    tokens = []
    for encoding in _tokenizer.encode_batch(documents, add_special_tokens=False):
        tokens.append(DOCUMENT_START)
        tokens.extend(encoding.ids)
    return np.array(tokens, dtype=np.uint16)
