"""Text as byte tokens: documents of a folder, the held-out ones, and the token array they make.

A byte is a token (0 … 255) and 256 stands before each document, so the vocabulary has 257 tokens and no tokenizer has
to be trained or downloaded.
"""

import hashlib
from pathlib import Path

import numpy as np

BYTE_DOCUMENT_START = 256
"""The token before each document; no byte has this value."""

BYTE_VOCABULARY = 257
"""256 bytes and the document start."""

HELD_OUT = 0.06
"""Share of the bytes that is held out for validation."""


def read_folder(folder: Path) -> list[bytes]:
    """Every text file below `folder`, in the order of its relative path: one file is one document, as UTF-8.

    What is not valid UTF-8 becomes U+FFFD. Left out are empty files, files that hold a NUL byte (no text has one) and
    everything whose name begins with a dot. All of it is held in memory; for more than a few GB of text use .bin
    shards.

    Raises:
        ValueError: no file is left.
    """
    documents = []
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            content = path.read_bytes()
            if content.strip() and b"\0" not in content:
                documents.append(content.decode("utf-8", errors="replace").encode("utf-8"))
    if not documents:
        raise ValueError(f"data.source {str(folder)!r} holds no text file with anything in it: put text files there.")
    return documents


def hold_out(documents: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Split into (training, validation): whole documents, chosen by what they say and not by where they stand.

    Documents that occur twice count once, or the validation could hold a copy of a training text. In the order of
    their SHA-256, which is as good as random, documents go to validation until they hold `HELD_OUT` of the bytes (at
    least one, and never all). Training keeps the given order; validation has the order of the hashes, so that its
    beginning is a fair sample too.

    Raises:
        ValueError: fewer than two different documents.
    """
    documents = list(dict.fromkeys(documents))
    if len(documents) < 2:
        raise ValueError(
            f"The data is {len(documents)} document, and validation holds out whole documents: split it into at least "
            "two files."
        )
    wanted = HELD_OUT * sum(map(len, documents))
    held_out: dict[bytes, None] = {}
    taken = 0
    for document in sorted(documents, key=lambda document: hashlib.sha256(document).digest())[:-1]:
        held_out[document] = None
        taken += len(document)
        if taken >= wanted:
            break
    return [document for document in documents if document not in held_out], list(held_out)


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
