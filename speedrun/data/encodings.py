"""Bytes of a file → text, without guessing. Which encoding a file is in, in this order:

1. A byte order mark says it: UTF-8, UTF-16 or UTF-32. The mark itself is no part of the text.
2. Where the user names an encoding, files are in that one. Excepted is what is valid UTF-8 with a letter outside ASCII:
   text of another encoding does not look like that by chance.
3. UTF-8.

What cannot be decoded so is an error that names the file: a guess would spoil text without a word. Plain Python.
"""

import codecs
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speedrun.data.report import printable
from strategies.errors import UserError

BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig", "UTF-8 with a byte order mark"),
    (b"\xff\xfe\0\0", "utf-32", "UTF-32"),  # before UTF-16, whose mark it begins with
    (b"\0\0\xfe\xff", "utf-32", "UTF-32"),
    (b"\xff\xfe", "utf-16", "UTF-16"),
    (b"\xfe\xff", "utf-16", "UTF-16"),
)
"""A byte order mark, Python's codec that takes it away, its name in words."""


def check_encoding(encoding: str) -> None:
    """Raise ValueError where Python knows no such text encoding. "" is none."""
    if encoding:
        try:
            " ".encode(encoding).decode(encoding)  # of nothing, Python would not look up the name
        except (LookupError, ValueError) as error:
            raise UserError(
                f"The encoding {encoding!r} is not known: write one such as cp1252, latin-1, shift_jis or gb18030."
            ) from error


def byte_order_mark(head: bytes) -> tuple[str, str] | None:
    """(Python's codec, its name in words) by the mark that `head` begins with; None where there is none."""
    return next(((codec, words) for mark, codec, words in BOMS if head.startswith(mark)), None)


def encoding_of(content: bytes, encoding: str) -> tuple[str, str]:
    """(Python's codec, its name in words) for a file. The name is "" for what is plain UTF-8 already."""
    if found := byte_order_mark(content[:4]):
        return found
    if not encoding or codecs.lookup(encoding).name == "utf-8":
        return "utf-8", ""
    if not content.isascii() and b"\0" not in content and _is_utf8(content):
        return "utf-8", ""
    return encoding, encoding


def decode(path: Path, content: bytes, codec: str) -> str:
    """A file's text, which UTF-8 can hold.

    Raises ValueError where it is not in that encoding; the sentence names the file and the first wrong byte.
    """
    try:
        text = content.decode(codec)
        text.encode()  # some codecs let half of a surrogate pair through
    except UnicodeError as error:
        raise undecodable(path, error, codec) from error
    return text


def undecodable(path: Path, error: UnicodeError, codec: str, begin: str = "") -> UserError:
    """What to raise; begin: what the position is counted from, if not the file's first byte."""
    where = ""
    if isinstance(error, UnicodeDecodeError) and error.start < len(error.object):
        where = f" (byte 0x{error.object[error.start]:02x} at position {error.start:,}{begin})"
    if codec not in ("utf-8", "utf-8-sig"):
        way_out = "give its encoding, save it as UTF-8, or take it out"
        return UserError(f"{printable(str(path))} is not text in {codec}{where}: {way_out}.")
    return UserError(
        f"{printable(str(path))} is not UTF-8{where}: name its encoding with --encoding (of the trainer: "
        "--data.encoding), such as cp1252, latin-1 or shift_jis, save it as UTF-8, or take it out."
    )


def why_it_has_nul(content: bytes) -> str:
    """Why a file with NUL bytes is left out. ASCII text in UTF-16 has one in every other byte."""
    for begin, codec in ((1, "utf-16-le"), (0, "utf-16-be")):
        high, low = content[begin::2], content[1 - begin :: 2]
        if len(content) > 3 and high.count(0) > 0.7 * len(high) and low.count(0) == 0:
            return f"NUL bytes, as UTF-16 without a byte order mark has them: if it is that, give --encoding {codec}"
    return "binary: it holds NUL bytes"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """An OSError as a ValueError that names the file or folder."""
    try:
        yield
    except OSError as error:
        why = error.strerror or os.strerror(error.errno or 0)
        raise UserError(f"{printable(str(path))} cannot be read ({why}): make it readable, or take it out.") from error


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
