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
"""Share of the bytes that is held out for validation. It is never more than twice that."""

MUCH = 0.10
"""Share beyond which what is held out is worth a warning."""


def hold_out(documents: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Split into (training, validation): whole documents, chosen by what they say and not by where they stand.

    Documents that occur twice count once, or the validation could hold a copy of a training text. In the order of
    their SHA-256, which is as good as random, documents go to validation until they hold `HELD_OUT` of the bytes. One
    with which they would hold more than twice that is passed over. Where each document is larger than that, the end of
    one goes to validation and its beginning stays. Training keeps the given order; validation has the order of the
    hashes, so that its beginning is a fair sample too.

    Raises:
        ValueError: fewer than two different documents.
    """
    by_digest = {hashlib.sha256(document).digest(): document for document in documents}
    copies = len(documents) - len(by_digest)
    held_out = choose_held_out({digest: len(document) for digest, document in by_digest.items()}, copies)
    pieces = {digest: split_end(document, held_out.get(digest, 0)) for digest, document in by_digest.items()}
    training = [begin for begin, _ in pieces.values() if begin]
    return training, [pieces[digest][1] for digest in held_out]


def choose_held_out(sizes: dict[bytes, int], copies: int = 0) -> dict[bytes, int]:
    """`hold_out` for documents that are not in memory: SHA-256 → bytes of each, to the ones held out, in their order,
    and how many of their last bytes. That is all of a document, but for the one that is cut (`split_end`).

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
    held_out: dict[bytes, int] = {}
    taken = 0
    for digest in sorted(sizes):
        if taken >= wanted:
            break
        if taken + sizes[digest] <= 2 * wanted:
            held_out[digest] = sizes[digest]
            taken += sizes[digest]
    if not held_out:
        first = min(sizes)
        held_out[first] = min(sizes[first], max(1, int(wanted)))
    return held_out


def split_end(document: bytes, length: int) -> tuple[bytes, bytes]:
    """Cut a document in UTF-8 into (beginning, end): the end has about `length` bytes and at most twice as many.

    It begins behind a blank line, else behind the end of a line, else behind a space, else at any character.
    """
    place = len(document) - length
    if length <= 0 or place <= 0:
        return (document, b"") if length <= 0 else (b"", document)
    lowest = max(1, place - length)
    for mark in (b"\n\n", b"\n", b" "):
        found = document.rfind(mark, lowest - 1, place)
        if found >= 0 and found + len(mark) >= lowest:
            return document[: found + len(mark)], document[found + len(mark) :]
    while place and document[place] & 0xC0 == 0x80:  # in the middle of a character
        place -= 1
    return document[:place], document[place:]


def chosen_as_before(documents: list[bytes]) -> bool:
    """Whether the same documents are held out as before there was a limit of twice the share: until then a document
    was never passed over, and the last one by its hash never taken.
    """
    sizes = {hashlib.sha256(document).digest(): len(document) for document in documents}
    before: dict[bytes, int] = {}
    for digest in sorted(sizes)[:-1]:
        if sum(before.values()) >= HELD_OUT * sum(sizes.values()):
            break
        before[digest] = sizes[digest]
    return before == choose_held_out(sizes)


def held_out_in_words(training: int, validation: int, *, cut: bool) -> str:
    """training, validation: bytes of text; cut: what is held out is the end of a document."""
    total = training + validation
    line = f"held out for validation: {validation:,} of {total:,} bytes of text ({validation / total:.1%})"
    line += ", the end of a document, as each is too large to be held out whole" if cut else ""
    line += f"; {training:,} to train on"
    if validation <= MUCH * total:
        return line
    return f"warning: {line}. That is much, for few and large documents: split them up."


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
