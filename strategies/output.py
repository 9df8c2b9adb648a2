"""Output that does not get lost: where a terminal lacks a character, and where a disk is full. Plain Python, and no
strategy: every part of the project may import it.
"""

from __future__ import annotations  # imported before the doctor looks at Python's version

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from strategies.errors import UserError


def any_character() -> None:
    """From now on a terminal or a pipe that lacks a character gets a question mark, and not an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def utf8(text: str) -> bytes:
    """A text as the bytes of a file. Where the locale is C, letters of a path from the command line come as single
    bytes (surrogates); they become what they were.
    """
    return text.encode("utf-8", "surrogateescape")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of a write as one sentence with the file's name. (A write's own error has none: a full disk.)"""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({why(error)}): make room, or name another place.") from error


def why(error: OSError) -> str:
    """What the system says of it, without number and name."""
    return error.strerror or os.strerror(error.errno or 0)
