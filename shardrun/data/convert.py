"""Files of tokens that others write → .bin shards with a sidecar.

nanoGPT           train.bin, val.bin      uint16 without a header, a document end behind each document
build-nanogpt     *_train_*.npy, …        NumPy arrays of uint16, a document start before each document
llm.c, modded-nanogpt   *_train_*.bin     as they are; here to be written again with another vocabulary
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardrun.data.writing import Together
from shardrun.output import write_whole
from speedrun.data.shards import FORMATS, open_shard, split_of, write_tokens
from speedrun.data.vocabulary import GPT2, LLAMA3, SIDECAR, Vocabulary, write_sidecar
from strategies.errors import UserError
from strategies.output import naming

SHARD_TOKENS = 100_000_000


@dataclass(frozen=True)
class Converted:
    """What `convert` has written."""

    shards: list[Path]
    tokens: int
    documents: int
    largest_token: int
    vocabulary: Vocabulary


def convert(
    sources: list[Path],
    out: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    document_start: int | None = None,
    dtype: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Converted:
    """Write files of tokens, or those of a folder, as `tokens_train_*.bin` and `tokens_val_*.bin` into `out`.

    A file's name says by the word train or val which it is. Whose tokens they are: the tokenizer file says it, or
    vocab_size and document_start (without that one: one more token); without both GPT-2's, and Llama 3's where tokens
    take 4 bytes. dtype: of files without a header, uint16 or uint32.

    Raises:
        ValueError: nothing to convert, a file that is not what it seems, a token outside the vocabulary; shards in
            `out` already.
    """
    together = Together(out)
    files = {split: [path for path in _files(sources) if split_of(path) == split] for split in ("val", "train")}
    if not all(files.values()):
        raise UserError(
            f"There are {len(files['train'])} files with train in their name and {len(files['val'])} with val (.bin or "
            ".npy): training needs at least one of each; rename what is for validation to val."
        )
    arrays = {path: _open(path, dtype) for paths in files.values() for path in paths}
    widest = max(array.dtype.itemsize for array in arrays.values())
    vocabulary = _vocabulary(tokenizer, vocab_size, document_start, LLAMA3 if widest > 2 else GPT2)
    start = vocabulary.document_start
    # Where a document start was added, what is there already has to be below it.
    limit = vocab_size if vocab_size and document_start is None and not tokenizer else vocabulary.size
    largest = max(_check(path, array, limit) for path, array in arrays.items())

    shards: list[Path] = []
    tokens = documents = 0
    with together:
        for split, paths in files.items():
            for path in paths:
                found = 0
                for part in _parts(arrays[path], start):
                    shards.append(out / f"tokens_{split}_{len(shards):06d}.bin")
                    with naming(shards[-1]):
                        write_tokens(together.part(shards[-1].name), part, vocabulary)
                    tokens += len(part)
                    found += int(np.count_nonzero(part == start))
                documents += found
                say(f"{path}: {len(arrays[path]):,} tokens, {found:,} document{'s' * (found != 1)}")
        if tokenizer and tokenizer.resolve() != (out / "tokenizer.json").resolve():
            write_whole(together.part("tokenizer.json"), tokenizer.read_bytes())
        more = {"documents": documents, "tokens": tokens, "converted_from": [path.name for path in arrays]}
        with naming(out / SIDECAR):
            write_sidecar(out, vocabulary, together.part(SIDECAR).name, **more)
    return Converted(shards, tokens, documents, largest, vocabulary)


def _files(sources: list[Path]) -> list[Path]:
    """The files named, and those in the folders named."""
    found = []
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"There is no file or folder {str(source)!r}: name one with .bin or .npy files.")
        inside = sorted(path for kind in ("*.bin", "*.npy") for path in source.glob(kind))
        found += inside if source.is_dir() else [source]
    return found


def _open(path: Path, dtype: str | None) -> np.ndarray:
    """Map a file's tokens into memory, whatever wrote it."""
    with open(path, "rb") as file:
        head = file.read(8)
    magic = int.from_bytes(head[:4], "little")
    if head.startswith(b"\x93NUMPY"):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path} cannot be read as a NumPy array ({error}): fetch it again.") from error
        if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
            raise UserError(f"{path} is {array.dtype} of shape {array.shape}, not a vector of tokens: leave it out.")
        return array
    if magic in FORMATS or path.suffix == ".npy":
        return open_shard(path)  # which says what is wrong, too
    width = 4 if dtype == "uint32" else 2
    size = path.stat().st_size
    if not size or size % width:
        raise UserError(f"{path} has {size} bytes, no whole number of tokens of {width} bytes each: fetch it again.")
    return np.memmap(path, dtype=f"<u{width}", mode="r")


def _vocabulary(
    tokenizer: Path | None, vocab_size: int | None, document_start: int | None, default: Vocabulary
) -> Vocabulary:
    if tokenizer:
        from shardrun.data.roundtrip import load_tokenizer, size_and_start

        size, start = size_and_start(load_tokenizer(tokenizer))
        start = start if document_start is None else document_start
        return Vocabulary(max(size, start + 1), start, hashlib.sha256(tokenizer.read_bytes()).hexdigest())
    if vocab_size is None and document_start is None:
        return default
    size = vocab_size or default.size
    start = size if document_start is None else document_start
    if size < 1 or start < 0:
        raise UserError(f"A vocabulary of {size} tokens with document start {start} cannot be: both count from 0.")
    return Vocabulary(max(size, start + 1), start)


def _check(path: Path, array: np.ndarray, limit: int) -> int:
    """The largest token. Raises ValueError for one that is not below `limit`."""
    largest = 0
    for begin in range(0, len(array), SHARD_TOKENS):
        part = array[begin : begin + SHARD_TOKENS]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= limit:
            token = low if low < 0 else high
            where = begin + int(np.argmax(part == token))
            raise UserError(
                f"{path} holds token {token} at position {where:,}, outside the vocabulary of {limit}: say "
                "whose tokens they are with --tokenizer or --vocab-size (and --dtype uint32 where a token takes 4 "
                "bytes); if they are none, leave it out."
            )
        largest = max(largest, high)
    return largest


def _parts(array: np.ndarray, start: int) -> "list[np.ndarray]":
    """The tokens in pieces of a shard each, a document start before the first: an end behind the last is dropped."""
    if len(array) > 1 and array[-1] == start:
        array = array[:-1]
    first = array[0] != start
    pieces = [array[begin : begin + SHARD_TOKENS] for begin in range(0, len(array), SHARD_TOKENS)]
    if first:
        pieces[0] = np.insert(pieces[0].astype(np.uint32), 0, start)
    return pieces
