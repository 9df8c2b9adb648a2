"""What a checkpoint's tokens stand for: bytes, or what a tokenizer makes, whose file lies beside the data."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.checkpoint.format import Index

GPT2_START = 50256


@dataclass(frozen=True)
class Tokens:
    """tokenizer: the content of its tokenizer.json, where there is one; words: what to say of them."""

    tokenizer: bytes | None
    words: str


def tokens_of(index: Index) -> Tokens:
    """Looked for where the run has read its data; nothing is fetched."""
    known: dict[str, Any] = index.run.get("tokens") or {}
    start = index.run.get("document_start")
    source = index.run["config"].get("data", {}).get("source", "")
    folder = Path(os.path.expanduser(known.get("folder") or source))
    # Checkpoints of earlier versions do not say it: then it is told by the source and what lies there.
    if known.get("bytes", start == 256 and (source == "pydocs" or not (folder / "tokens.json").is_file())):
        return Tokens(
            None,
            "There is no tokenizer: a token is a byte of UTF-8 text (0 to 255), and 256 stands before each document.",
        )
    digest = known.get("tokenizer_sha256", "") or _sidecar_digest(folder)
    path: Path | None = folder / "tokenizer.json"
    if path and not path.is_file():
        path = _gpt2s() if start == GPT2_START and not digest else None
    begins = f"Token {start} stands before each document."
    if path is None:
        whose = "GPT-2's (openai-community/gpt2)" if start == GPT2_START and not digest else "those of its data"
        named = f" with the SHA-256 {digest}" if digest else ""
        return Tokens(
            None, f"The tokens are {whose}. Their tokenizer.json{named} is not in {folder}: put it here. {begins}"
        )
    content = path.read_bytes()
    if digest and hashlib.sha256(content).hexdigest() != digest:
        return Tokens(
            None, f"{path} is not the tokenizer that made the tokens: that one has the SHA-256 {digest}. {begins}"
        )
    return Tokens(content, f"`tokenizer.json` is the tokenizer that made the tokens. {begins}")


def _sidecar_digest(folder: Path) -> str:
    from speedrun.data.vocabulary import read_sidecar

    try:
        found = read_sidecar(folder)
    except ValueError:
        return ""
    return found.tokenizer_sha256 if found else ""


def _gpt2s() -> Path | None:
    from speedrun.data.fineweb import cached_gpt2_tokenizer

    return cached_gpt2_tokenizer()
