"""Text as byte tokens: documents of a folder, the held-out ones, and the token array they make.

A byte is a token (0 … 255) and 256 stands before each document, so the vocabulary has 257 tokens and no tokenizer has
to be trained or downloaded.
"""

import hashlib
from pathlib import Path

import numpy as np

BYTE_DOCUMENT_START = 256
"""The token before each document; no byte has this value."""

HELD_OUT = 0.06
"""Share of the bytes that is held out for validation."""


def read_folder(folder: Path) -> list[bytes]:
    """Every text file below `folder`, in the order of its relative path: one file is one document, as UTF-8.

    What is not valid UTF-8 becomes U+FFFD. Left out are empty files, files that hold a NUL byte (no text has one) and
    everything whose name begins with a dot. All of it is held in memory: use .bin shards for more than a few GB.

    Raises:
        ValueError: no file is left.
    """
    documents = [document for path in text_files(folder) if (document := read_document(path))]
    if not documents:
        raise ValueError(f"data.source {str(folder)!r} holds no text file with anything in it: put text files there.")
    return documents


def text_files(folder: Path) -> list[Path]:
    """The files below `folder` that may hold text, in the order of their relative paths; no name begins with a dot."""
    files = ((path.relative_to(folder), path) for path in folder.rglob("*"))
    visible = [(name.as_posix(), path) for name, path in files if not any(part[0] == "." for part in name.parts)]
    return [path for _, path in sorted(visible) if path.is_file()]


def read_document(path: Path) -> bytes:
    """A file's text as valid UTF-8; nothing where the file is empty or holds a NUL byte."""
    content = path.read_bytes()
    if b"\0" in content or not content.strip():
        return b""
    return content.decode("utf-8", errors="replace").encode("utf-8")


def hold_out(documents: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Split into (training, validation): whole documents, chosen by what they say and not by where they stand.

    Documents that occur twice count once, or the validation could hold a copy of a training text. In the order of
    their SHA-256, which is as good as random, documents go to validation until they hold `HELD_OUT` of the bytes (at
    least one, and never all). Training keeps the given order; validation has the order of the hashes, so that its
    beginning is a fair sample too.

    Raises:
        ValueError: fewer than two different documents.
    """
    by_digest = {hashlib.sha256(document).digest(): document for document in documents}
    held_out = choose_held_out({digest: len(document) for digest, document in by_digest.items()})
    training = [document for digest, document in by_digest.items() if digest not in held_out]
    return training, [by_digest[digest] for digest in held_out]


def choose_held_out(sizes: dict[bytes, int]) -> dict[bytes, None]:
    """`hold_out` for documents that are not in memory: SHA-256 → bytes of each, to the ones held out, in their order.

    Raises:
        ValueError: fewer than two documents.
    """
    if len(sizes) < 2:
        raise ValueError(
            f"The data is {len(sizes)} document, and validation holds out whole documents: split it into at least "
            "two files."
        )
    wanted = HELD_OUT * sum(sizes.values())
    held_out: dict[bytes, None] = {}
    taken = 0
    for digest in sorted(sizes)[:-1]:
        held_out[digest] = None
        taken += sizes[digest]
        if taken >= wanted:
            break
    return held_out


def byte_tokens(documents: list[bytes]) -> np.ndarray:
    """The documents one after another, each with 256 before it: uint16 [bytes + documents]."""
    tokens = np.empty(sum(map(len, documents)) + len(documents), dtype=np.uint16)
    position = 0
    for document in documents:
        tokens[position] = BYTE_DOCUMENT_START
        tokens[position + 1 : position + 1 + len(document)] = np.frombuffer(document, dtype=np.uint8)
        position += 1 + len(document)
    return tokens


def content_hash(documents: list[bytes]) -> str:
    """SHA-256 over the documents in order, each with its length before it, as hexadecimal digits."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))
        digest.update(document)
    return digest.hexdigest()
