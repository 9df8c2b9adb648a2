"""FineWeb-style .bin shards of tokens: written, checked and read by memory map.

A shard is a header of 256 little-endian int32 and then its tokens, little-endian. The header holds a magic number, a
version, the count of tokens and zeros:

    magic 20240520, version 1    uint16    GPT-2's in FineWeb, llm.c and modded-nanogpt
    magic 20240801, version 7    uint32    Llama 3's in llm.c

Where the tokens are neither, the fourth number is the vocabulary's size, and a sidecar in the folder says the rest
(`speedrun.data.vocabulary`). A document start stands before each document. A document may begin in one shard and go on
in the next; here the rest counts as a document of its own.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from speedrun.data.kinds import convert_command, recognised
from speedrun.data.vocabulary import GPT2, LLAMA3, SIDECAR, Vocabulary, read_sidecar
from strategies.errors import UserError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
GPT2_DOCUMENT_START = GPT2.document_start

PAGE = 4096
SAMPLES = 64
"""Pages of this many bytes that stand for a shard's tokens where it is compared with what it was."""

FORMATS = {MAGIC: (VERSION, "<u2", GPT2), 20240801: (7, "<u4", LLAMA3)}
"""Magic → version, dtype, and whose tokens they are where the header says no more."""


def find_shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folder's (training, validation) shards, sorted by name: `*_train_*.bin`, or `train.bin` or `x-train-1.bin`,
    and the same with `val`.

    Raises:
        ValueError: one of the two kinds is missing.
    """
    paths = sorted(folder.glob("*.bin"))
    training, validation = ([path for path in paths if split_of(path) == split] for split in ("train", "val"))
    if not training or not validation:
        raise UserError(
            f"data.source {str(folder)!r} holds {len(training)} shards named *_train_*.bin and {len(validation)} named "
            "*_val_*.bin, but training needs at least one of each: add or rename the missing ones, or take the .bin "
            "files away if it is a folder of text."
        )
    return training, validation


def split_of(path: Path) -> str:
    """train, val or "", by the words of a file's name."""
    words = re.split(r"[^a-z]+", path.stem.lower())
    found = [split for split, names in (("train", TRAIN), ("val", VALIDATION)) if not names.isdisjoint(words)]
    return found[0] if len(found) == 1 else ""


TRAIN, VALIDATION = frozenset({"train", "training"}), frozenset({"val", "valid", "validation"})


def shards_vocabulary(folder: Path, paths: list[Path]) -> Vocabulary:
    """Whose tokens a folder's shards hold.

    Raises:
        ValueError: a shard is damaged, or of other tokens than the sidecar or the first shard; a broken sidecar.
    """
    said = read_sidecar(folder)
    first = said or FORMATS[_header(paths[0])[0]][2]
    for path in paths:
        magic, _, marked = _header(path)
        own = FORMATS[magic][2]
        if marked and not said:
            raise UserError(
                f"Shard {path} holds tokens of a vocabulary of {marked}, but there is no {SIDECAR} beside it that says "
                f"which: copy it along with the shards, or write them again with `shardrun data tokenize`."
            )
        right = marked == first.size if marked else own.is_like(first)
        if not right or own.dtype != first.dtype:
            by = SIDECAR if said else paths[0].name
            raise UserError(
                f"Shard {path} holds tokens of a vocabulary of {marked or own.size} ({own.dtype}), but {by} is of "
                f"{first.size} ({first.dtype}, document start {first.document_start}): keep shards of different "
                f"tokenizers in folders of their own."
            )
    return first


def open_shard(path: Path) -> np.ndarray:
    """Map a shard's tokens into memory, uint16 or uint32 [count]; nothing is read but the header.

    Raises:
        ValueError: the header or the file's length is wrong; the sentence names the file and the numbers.
    """
    magic, count, _ = _header(path)
    dtype = np.dtype(FORMATS[magic][1])
    size, width = path.stat().st_size, dtype.itemsize
    body = size - HEADER_BYTES
    if body % width:
        what = "an odd number" if width == 2 else "no multiple of 4"
        raise UserError(
            f"Shard {path} has {body} bytes of tokens, {what}, though a token takes {width} (its header promises "
            f"{count} tokens, {width * count} bytes): fetch or write it again."
        )
    if body != width * count:
        what = "was cut short" if body < width * count else "has something behind its tokens"
        raise UserError(
            f"Shard {path} holds {body // width} tokens but its header promises {count} (the file has {size} bytes, "
            f"not {HEADER_BYTES + width * count}): it {what}; fetch or write it again."
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))


def shard_format(path: Path) -> tuple[int, int]:
    """A shard's (magic number, version). Raises ValueError for what is no shard."""
    magic = _header(path)[0]
    return magic, FORMATS[magic][0]


def _header(path: Path) -> tuple[int, int, int]:
    """A shard's magic number, its count of tokens and the vocabulary that it names (0: its format's own).

    Raises ValueError for what is no shard.
    """
    if not path.is_file():
        raise UserError(f"Shard {path} is not a file (a folder, or a link to nothing): take it away.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    kind = recognised(head)
    if kind and not kind.startswith("a shard"):
        raise UserError(f"Shard {path} is no shard but {kind}.")
    if size < HEADER_BYTES:
        raise UserError(
            f"Shard {path} has {size} bytes, less than its header of {HEADER_BYTES}: fetch or write it again."
        )
    magic, version, count, vocabulary = (int(number) for number in np.frombuffer(head, dtype="<i4")[:4])
    if magic not in FORMATS:
        if head.lstrip()[:5].lower() in (b"<html", b"<!doc"):
            raise UserError(f"Shard {path} is a web page, perhaps one that says why there is no file: fetch it again.")
        raise UserError(
            f"Shard {path} begins with {magic}, not with the magic number {MAGIC}: it is not a shard. If it is "
            f"tokens without a header, as nanoGPT writes them, convert it: `{convert_command(path.parent)}`."
        )
    if version != FORMATS[magic][0]:
        raise UserError(
            f"Shard {path} has version {version}, only {FORMATS[magic][0]} can be read: write it again in that one."
        )
    if count < 1:
        raise UserError(f"Shard {path} says that it holds {count} tokens: take it out of the folder.")
    if vocabulary < 0:
        raise UserError(f"Shard {path} says that its vocabulary has {vocabulary} tokens: write it again.")
    return magic, count, vocabulary


def write_tokens(path: Path, tokens: np.ndarray, vocabulary: Vocabulary = GPT2) -> None:
    """Write integer tokens [count] of a vocabulary as a shard: uint16, or uint32 where the vocabulary needs that.

    Raises:
        ValueError: no tokens, or one that the dtype cannot hold.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise UserError(f"A shard needs a vector of at least one integer, not {tokens.dtype} of shape {tokens.shape}.")
    magic = next(magic for magic, (_, _, whose) in FORMATS.items() if whose.dtype == vocabulary.dtype)
    version, dtype, whose = FORMATS[magic]
    low, high, limit = int(tokens.min()), int(tokens.max()), np.iinfo(dtype).max
    if low < 0 or high > limit:
        raise UserError(
            f"A shard of {vocabulary.dtype} holds tokens from 0 to {limit}, not {low if low < 0 else high}: it is of "
            "another tokenizer."
        )
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    if not vocabulary.is_like(whose):
        header[3] = vocabulary.size
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype).data)


def shards_hash(paths: list[Path], whose: Vocabulary = GPT2) -> str:
    """SHA-256 over each shard's name, size, header and `SAMPLES` pages of its tokens, and over whose tokens they are
    where a sidecar says that.

    Not over all tokens: hashing gigabytes would delay the start. A shard of up to 256 KiB is hashed whole.
    """
    digest = _hash_of_headers(paths, whose)
    for path in paths:
        digest.update(_sample(path))
    return digest.hexdigest()


def shards_hash_before(paths: list[Path], whose: Vocabulary = GPT2) -> str:
    """What checkpoints of earlier versions hold: `shards_hash` without the pages."""
    return _hash_of_headers(paths, whose).hexdigest()


def _hash_of_headers(paths: list[Path], whose: Vocabulary) -> "hashlib._Hash":
    digest = hashlib.sha256()
    if whose not in (GPT2, LLAMA3):
        digest.update(f"{whose}\n".encode())
    for path in paths:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(header)
    return digest


def _sample(path: Path) -> bytes:
    """SHA-256 of a file's pages, `SAMPLES` of them spread evenly over it, the first and the last among them."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    places = range(0, size, PAGE)
    if len(places) > SAMPLES:
        places = range(0, size - PAGE + 1, (size - PAGE) // (SAMPLES - 1))
    with open(path, "rb", buffering=0) as file:
        for place in places:
            file.seek(place)
            digest.update(file.read(PAGE))
        file.seek(max(0, size - PAGE))
        digest.update(file.read(PAGE))
    return digest.digest()


class DataChangedError(UserError):
    """A shard is not what it was when the run began."""


class Watched:
    """A shard's file as it is now, to be looked at again before its tokens are read, and read without a memory map:
    where the file has become shorter, touching a map of it ends the process with SIGBUS.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = self._look()
        self._sample = _sample(path)

    def check(self) -> None:
        """Raise DataChangedError where the file has become another. One that was only touched, or put in the place of
        the same, is taken as it is.
        """
        now = self._look()
        if now == self._state:
            return
        size, was = now[0], self._state[0]
        if size != was:
            kind = "shorter" if size < was else "longer"
            numbers = f"{was} bytes then, {size} now"
            raise DataChangedError(f"Shard {self.path} has become {kind} since the run began ({numbers}){_WAY}")
        if _sample(self.path) != self._sample:
            raise DataChangedError(f"Shard {self.path} holds other tokens than when the run began{_WAY}")
        self._state = now

    def read(self, first: int, last: int, dtype: np.dtype[Any]) -> np.ndarray:
        """Tokens [first, last): [last − first] of dtype. Raises DataChangedError where the file ends before."""
        wanted = max(0, last - first) * dtype.itemsize
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(HEADER_BYTES + first * dtype.itemsize)
                content = file.read(wanted)
        except OSError as error:
            raise DataChangedError(f"Shard {self.path} is not there any more ({error.strerror}){_WAY}") from error
        if len(content) < wanted:
            raise DataChangedError(f"Shard {self.path} has become shorter since the run began{_WAY}")
        return np.frombuffer(content, dtype)

    def _look(self) -> tuple[int, int, int, int]:
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise DataChangedError(f"Shard {self.path} is not there any more ({error.strerror}){_WAY}") from error
        return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


_WAY = ": put the same file there again, and go on with --resume auto."
