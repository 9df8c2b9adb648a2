"""Files that hold no text, recognised by how they begin. Plain Python."""

import shlex
from pathlib import Path

KINDS = (
    (
        b"version https://git-lfs.github.com/spec/v1",
        "a Git LFS pointer, not the file itself: `git lfs pull` fetches it",
    ),
    (b"\x93NUMPY", "a NumPy array; if it holds tokens, `shardrun data convert` makes shards of it"),
    ((20240520).to_bytes(4, "little"), "a shard of tokens: give its own folder as the source"),
    ((20240801).to_bytes(4, "little"), "a shard of tokens: give its own folder as the source"),
    (b"PAR1", "Parquet: let its name end in .parquet"),
    (b"\x1f\x8b\x08", "compressed (gzip): unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd): unpack it"),
    (b"\xfd7zXZ\0", "compressed (xz): unpack it"),
    (b"BZh91AY&SY", "compressed (bzip2): unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "an archive (7z): unpack it"),
    (b"PK\x03\x04", "an archive (zip; Office files and .npz are archives too): unpack it"),
    (b"%PDF-", "a PDF: save its text"),
    (b"{\\rtf", "RTF: save it as plain text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file: save it as plain text"),
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"GIF87a", "a picture (GIF)"),
    (b"GIF89a", "a picture (GIF)"),
    (b"\x7fELF", "a program (ELF)"),
    (b"SQLite format 3\0", "a database (SQLite)"),
    (b"\x80\x04\x95", "a Python pickle"),
    (b"\x80\x05\x95", "a Python pickle"),
)
"""How a file begins → what it is. No text begins so."""


def recognised(head: bytes) -> str | None:
    """What a file is that begins with `head` (at least 64 bytes where it has them), if no text; None if not known."""
    return next((kind for magic, kind in KINDS if head.startswith(magic)), None)


def convert_command(folder: Path) -> str:
    """What makes shards of foreign files of tokens, to be typed."""
    return f"shardrun data convert {shlex.quote(str(folder))} --out {shlex.quote(f'{folder}-shards')}"
