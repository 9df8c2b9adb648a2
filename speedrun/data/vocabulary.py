"""Which tokens a folder of shards holds: its sidecar `tokens.json`, and what shards without one are. Plain Python.

    {"schema": 1, "dtype": "uint16", "vocab_size": 601, "document_start": 600,
     "tokenizer": {"file": "tokenizer.json", "sha256": "…"}, …}

A folder without it holds GPT-2's tokens (FineWeb, llm.c and modded-nanogpt write such shards), or Llama 3's where its
shards are those that llm.c writes of them.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies import strict_json
from strategies.errors import UserError

SIDECAR = "tokens.json"
SCHEMA = 1


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a source."""

    size: int
    """Tokens are below it; the document start too."""
    document_start: int
    """The token before each document."""
    tokenizer_sha256: str = ""
    """Of the tokenizer's file; "" where nobody said."""

    @property
    def dtype(self) -> str:
        """What a token takes in a shard."""
        return "uint16" if self.size <= 1 << 16 else "uint32"

    def is_like(self, other: "Vocabulary") -> bool:
        """As large, with the same document start: whose tokenizer it is does not count."""
        return (self.size, self.document_start) == (other.size, other.document_start)


GPT2 = Vocabulary(50257, 50256)
LLAMA3 = Vocabulary(128_256, 128_000)


def read_sidecar(folder: Path) -> Vocabulary | None:
    """What the folder's `tokens.json` says; None where there is none.

    Raises:
        ValueError: it cannot be read, is of a newer schema, or says what cannot be.
    """
    path = folder / SIDECAR
    if not path.exists():
        return None
    again = "write the shards again with `shardrun data tokenize` or `shardrun data convert`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {again}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise UserError(f"{path} says nothing of a schema, so it is not of Shardrun: take it away, or {again}.")
    if content["schema"] > SCHEMA:
        raise UserError(f"{path} has schema {content['schema']}, newer than {SCHEMA}: update Shardrun.")
    size: Any = content.get("vocab_size")
    start: Any = content.get("document_start")
    tokenizer = content.get("tokenizer")
    digest = tokenizer.get("sha256", "") if isinstance(tokenizer, dict) else ""
    good = all(type(number) is int for number in (size, start)) and 0 <= start < size <= 1 << 31
    if not good or not isinstance(digest, str):
        raise UserError(
            f"{path} gives vocab_size {size!r} and document_start {start!r}, but a document start is a token from 0 to "
            f"vocab_size − 1: {again}."
        )
    vocabulary = Vocabulary(size, start, digest)
    if content.get("dtype") != vocabulary.dtype:
        raise UserError(
            f"{path} gives dtype {content.get('dtype')!r}, but {size} tokens take {vocabulary.dtype}: {again}."
        )
    return vocabulary


def write_sidecar(folder: Path, vocabulary: Vocabulary, name: str = SIDECAR, **more: Any) -> None:
    """Put `tokens.json`, under another name where it is not to be read yet, into a folder of shards; more: what else it
    says, for readers.
    """
    content = {
        "schema": SCHEMA,
        "dtype": vocabulary.dtype,
        "vocab_size": vocabulary.size,
        "document_start": vocabulary.document_start,
        "tokenizer": {"file": "tokenizer.json", "sha256": vocabulary.tokenizer_sha256},
        **more,
    }
    (folder / name).write_text(strict_json.dumps(content, indent=2) + "\n", encoding="utf-8")


def vocabulary_of(source: str) -> int | None:
    """Distinct tokens of a `data.source`, where its sidecar says so; else None.

    Raises ValueError as `read_sidecar`.
    """
    found = read_sidecar(Path(os.path.expanduser(source)))
    return found.size if found else None
