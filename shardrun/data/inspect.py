"""`shardrun data inspect`: what is in a shard, and what a folder of text gives."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from strategies.errors import UserError

EXCERPT = 300
"""Characters shown of a shard's first document."""

Say = Callable[[str], None]


def inspect_all(arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Every file and folder named. Returns what `--json` prints.

    Raises ValueError for a damaged shard, FileNotFoundError for a name of nothing.
    """
    shards: list[Path] = []
    folders: list[Path] = []
    for path in arguments.files:
        if path.is_dir():
            inside = sorted(path.glob("*.bin"))
            shards += inside
            folders += [] if inside else [path]
        elif path.is_file():
            shards.append(path)
        else:
            raise FileNotFoundError(f"There is no file {str(path)!r}: name a .bin shard, or a folder.")
    return {
        "shards": [_shard(path, arguments, say) for path in shards],
        "folders": [_folder(path, arguments, say) for path in folders],
    }


def _folder(folder: Path, arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    """A folder of text: what becomes of each file."""
    from dataclasses import asdict

    from speedrun.data.documents import read_folder

    _, report = read_folder(folder, arguments.encoding, arguments.text_field)
    say(f"{folder}: a folder of text")
    for line in report.lines():
        say(f"  {line}")
    return {"folder": str(folder), **asdict(report)}


def _shard(path: Path, arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    import numpy as np

    from speedrun.data.shards import open_shard, shard_format, shards_vocabulary

    tokens = open_shard(path)
    magic, version = shard_format(path)
    whose = shards_vocabulary(path.parent, [path])
    vocab_size = arguments.vocab_size or whose.size
    size, largest = path.stat().st_size, int(tokens.max())
    if largest >= vocab_size:
        where = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"Shard {path} holds token {tokens[where]} at position {where}, outside the vocabulary of "
            f"{vocab_size}: it was made by another tokenizer; name its size with --vocab-size."
        )
    starts = np.flatnonzero(tokens == whose.document_start)
    begins_inside = bool(tokens[0] != whose.document_start)
    # The first document that begins here; where none does, what there is of the one that fills the shard.
    begin, end = (int(starts[0]) + 1, int([*starts[1:2], len(tokens)][0])) if len(starts) else (0, len(tokens))
    content = {
        "file": str(path),
        "bytes": size,
        "magic": magic,
        "version": version,
        "dtype": whose.dtype,
        "vocab_size": vocab_size,
        "document_start": whose.document_start,
        "tokens": len(tokens),
        "documents": len(starts),
        "begins_in_mid_document": begins_inside,
        "largest_token": largest,
        "first_document_tokens": end - begin,
        "first_document_text": None,
    }
    say(f"{path}: {size:,} bytes, magic {magic}, version {version}, {len(tokens):,} tokens ({whose.dtype})")
    mean = f", {len(tokens) / len(starts):,.0f} tokens each on average" if len(starts) else ""
    rest = "; it begins with the rest of one of another shard" if begins_inside else ""
    say(f"{len(starts):,} documents begin in it{mean}{rest}; largest token {largest}")
    say(f"Vocabulary of {vocab_size:,}, token {whose.document_start} before each document")
    tokenizer = _tokenizer_at_hand(path, arguments.tokenizer)
    if tokenizer is None:
        say("No tokenizer at hand to decode it: name one with --tokenizer.")
    else:
        text = tokenizer.decode(tokens[begin : min(end, begin + EXCERPT)].tolist(), skip_special_tokens=False)
        content["first_document_text"] = text[:EXCERPT]
        say(f"First document ({end - begin:,} tokens): {text[:EXCERPT]!r}")
    return content


def _tokenizer_at_hand(shard: Path, named: Path | None) -> Any:
    """The tokenizer to decode a shard with, without any download; None where there is none."""
    from shardrun.data.roundtrip import load_tokenizer
    from speedrun.data import fineweb
    from speedrun.data.shards import shards_vocabulary
    from speedrun.data.vocabulary import GPT2

    if named:
        fineweb.require("tokenizers", "decoding")
        return load_tokenizer(named)
    try:
        path: Path | None = shard.parent / "tokenizer.json"
        if path and not path.is_file():
            is_gpt2 = shards_vocabulary(shard.parent, [shard]).is_like(GPT2)
            path = fineweb.cached_gpt2_tokenizer() if is_gpt2 else None
        return load_tokenizer(path) if path else None
    except ImportError:
        return None
