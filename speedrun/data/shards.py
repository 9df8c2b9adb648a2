"""FineWeb-style .bin shards of GPT-2 tokens: written, checked and read by memory map.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros) and then that many
little-endian uint16 tokens. The end-of-text token 50256 stands before each document. A document may begin in one shard
and go on in the next; here the rest counts as a document of its own.
"""

import hashlib
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
GPT2_DOCUMENT_START = 50256


def find_shards(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folder's (training, validation) shards, sorted by name: `*_train_*.bin` and `*_val_*.bin`.

    Raises:
        ValueError: one of the two kinds is missing.
    """
    training, validation = sorted(folder.glob("*_train_*.bin")), sorted(folder.glob("*_val_*.bin"))
    if not training or not validation:
        raise ValueError(
            f"data.source {str(folder)!r} holds {len(training)} shards named *_train_*.bin and {len(validation)} named "
            "*_val_*.bin, but training needs at least one of each: add or rename the missing ones."
        )
    return training, validation


def open_shard(path: Path) -> np.ndarray:
    """Map a shard's tokens into memory, uint16 [count]; nothing is read but the header.

    Raises:
        ValueError: the header or the file's length is wrong; the sentence names the file and the numbers.
    """
    if not path.is_file():
        raise ValueError(f"Shard {path} is not a file (a folder, or a link to nothing): take it away.")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(
            f"Shard {path} has {size} bytes, less than its header of {HEADER_BYTES}: fetch or write it again."
        )
    header = np.fromfile(path, dtype="<i4", count=HEADER_BYTES // 4)
    magic, version, count = (int(number) for number in header[:3])
    if magic != MAGIC:
        raise ValueError(
            f"Shard {path} begins with {magic}, not with the magic number {MAGIC}: it is not a shard of GPT-2 tokens; "
            "take it out of the folder or convert it."
        )
    if version != VERSION:
        raise ValueError(f"Shard {path} has version {version}, only {VERSION} can be read: write it again in that one.")
    if count < 1:
        raise ValueError(f"Shard {path} says that it holds {count} tokens: take it out of the folder.")
    body = size - HEADER_BYTES
    if body % 2:
        raise ValueError(
            f"Shard {path} has {body} bytes of tokens, an odd number, though a token takes 2 (its header promises "
            f"{count} tokens, {2 * count} bytes): fetch or write it again."
        )
    if body != 2 * count:
        what = "was cut short" if body < 2 * count else "has something behind its tokens"
        raise ValueError(
            f"Shard {path} holds {body // 2} tokens but its header promises {count} (the file has {size} bytes, not "
            f"{HEADER_BYTES + 2 * count}): it {what}; fetch or write it again."
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def write_tokens(path: Path, tokens: np.ndarray) -> None:
    """Write integer tokens [count] as a shard.

    Raises:
        ValueError: no tokens, or one that uint16 cannot hold.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise ValueError(f"A shard needs a vector of at least one integer, not {tokens.dtype} of shape {tokens.shape}.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"A shard holds tokens from 0 to 65535, not {low if low < 0 else high}: use a smaller tokenizer."
        )
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())


def shards_hash(paths: list[Path]) -> str:
    """SHA-256 over each shard's name, size and header, not over its tokens: hashing gigabytes would delay the start."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(header)
    return digest.hexdigest()
