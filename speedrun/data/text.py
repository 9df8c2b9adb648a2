"""Text as byte tokens: which documents are held out, and the token array that documents make.

A byte is a token (0 … 255) and 256 stands before each document, so the vocabulary has 257 tokens and no tokenizer has
to be trained or downloaded.
"""

import hashlib

import numpy as np

from strategies.errors import UserError

BYTE_DOCUMENT_START = 256
"""The token before each document; no byte has this value."""

HELD_OUT = 0.06
"""Share of the bytes that is held out for validation."""


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
    copies = len(documents) - len(by_digest)
    held_out = choose_held_out({digest: len(document) for digest, document in by_digest.items()}, copies)
    training = [document for digest, document in by_digest.items() if digest not in held_out]
    return training, [by_digest[digest] for digest in held_out]


def choose_held_out(sizes: dict[bytes, int], copies: int = 0) -> dict[bytes, None]:
    """`hold_out` for documents that are not in memory: SHA-256 → bytes of each, to the ones held out, in their order.

    copies: documents beside these that say the same as one of them; for the error's sentence.

    Raises:
        ValueError: fewer than two documents.
    """
    if len(sizes) < 2:
        more = f" and {copies} copies of it, which do not count," if copies else ""
        more = more.replace("1 copies of it, which do", "1 copy of it, which does")
        raise UserError(
            f"The data is {len(sizes)} document{more or ','} and validation holds out whole documents: split it into "
            "at least two files."
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
