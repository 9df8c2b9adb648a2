"""`shardrun data`: fetch FineWeb's shards, make shards of a folder of text, look into a shard."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from shardrun.help import add_parser

EXCERPT = 300
"""Characters shown of a shard's first document."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, about: str) -> argparse.ArgumentParser:
        added = add_parser(actions, name, about)
        added.add_argument("--json", action="store_true", help="print JSON")
        return added

    fineweb = action("fineweb", "fetch FineWeb in GPT-2 tokens from the Hugging Face hub; run it again to continue")
    fineweb.add_argument("--shards", type=int, default=9, help="training shards of 100M tokens, 200 MB (default: 9)")
    fineweb.add_argument("--out", type=Path, default=Path("data/fineweb10B"), help="default: data/fineweb10B")

    tokenize = action("tokenize", "write a folder of text files as .bin shards of BPE tokens, 6 % of it held out")
    tokenize.add_argument("folder", type=Path, help="every text file below it is one document")
    tokenize.add_argument("--out", type=Path, help="where the shards go (default: data/NAME OF FOLDER)")
    tokenize.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json (default: GPT-2's, fetched once from the hub)"
    )
    tokenize.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    tokenize.add_argument("--shard-tokens", type=int, default=100_000_000, help="default: 100,000,000")

    inspect = action("inspect", "check .bin shards and say what is in them")
    inspect.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a .bin shard")
    inspect.add_argument("--vocab-size", type=int, default=50257, help="tokens must be below it (default: 50257)")
    inspect.add_argument(
        "--tokenizer",
        type=Path,
        help="to decode with (default: tokenizer.json beside FILE, or GPT-2's if fetched before)",
    )


def run(arguments: argparse.Namespace) -> int:
    show = {"fineweb": _fineweb, "tokenize": _tokenize, "inspect": _inspect_all}[arguments.action]
    content = show(arguments, (lambda line: None) if arguments.json else lambda line: print(line, flush=True))
    if arguments.json:
        print(json.dumps({"schema": 2 if arguments.action == "inspect" else 1, **content}, indent=2))
    return 0


def _fineweb(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    from speedrun.data import fineweb

    done = fineweb.fetch(arguments.out, arguments.shards, say)
    say(
        f"{arguments.out}: {len(done.files)} shards of {fineweb.REPOSITORY} at {done.commit[:12]}, "
        f"{done.fetched_bytes:,} bytes fetched. Train with --data.source {arguments.out}"
    )
    return {"folder": str(arguments.out), "repository": fineweb.REPOSITORY, **asdict(done)}


def _tokenize(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    from shardrun.data.tokenize import tokenize
    from speedrun.data import fineweb

    if not arguments.folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(arguments.folder)!r}: name one that holds text files.")
    fineweb.require("tokenizers", "BPE")
    out = arguments.out or Path("data") / arguments.folder.resolve().name
    tokenizer = arguments.tokenizer or fineweb.gpt2_tokenizer()
    started = perf_counter()
    with _bar() as progress:
        done = tokenize(arguments.folder, out, tokenizer, arguments.processes, arguments.shard_tokens, progress)
    seconds = perf_counter() - started
    say(
        f"{out}: {done.documents:,} documents, {done.text_bytes:,} bytes of text, {done.tokens:,} tokens in "
        f"{len(done.shards)} shards, {seconds:.1f} s ({done.text_bytes / seconds / 1e6:.1f} MB/s on "
        f"{arguments.processes} processes). Train with --data.source {out}"
    )
    return {
        "folder": str(out),
        "tokenizer": str(tokenizer),
        **asdict(done),
        "shards": [str(path) for path in done.shards],
        "seconds": seconds,
    }


def _inspect_all(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    for path in arguments.files:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {str(path)!r}: name a .bin shard.")
    return {"shards": [_inspect(path, arguments, say) for path in arguments.files]}


def _inspect(path: Path, arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    import numpy as np

    from speedrun.data.shards import GPT2_DOCUMENT_START, MAGIC, VERSION, open_shard

    tokens = open_shard(path)
    size, largest = path.stat().st_size, int(tokens.max())
    if largest >= arguments.vocab_size:
        where = int(np.argmax(tokens >= arguments.vocab_size))
        raise ValueError(
            f"Shard {path} holds token {tokens[where]} at position {where}, outside the vocabulary of "
            f"{arguments.vocab_size}: it was made by another tokenizer; name its size with --vocab-size."
        )
    starts = np.flatnonzero(tokens == GPT2_DOCUMENT_START)
    begins_inside = bool(tokens[0] != GPT2_DOCUMENT_START)
    # The first document that begins here; where none does, what there is of the one that fills the shard.
    begin, end = (int(starts[0]) + 1, int([*starts[1:2], len(tokens)][0])) if len(starts) else (0, len(tokens))
    content = {
        "file": str(path),
        "bytes": size,
        "magic": MAGIC,
        "version": VERSION,
        "tokens": len(tokens),
        "documents": len(starts),
        "begins_in_mid_document": begins_inside,
        "largest_token": largest,
        "first_document_tokens": end - begin,
        "first_document_text": None,
    }
    say(f"{path}: {size:,} bytes, magic {MAGIC}, version {VERSION}, {len(tokens):,} tokens")
    mean = f", {len(tokens) / len(starts):,.0f} tokens each on average" if len(starts) else ""
    rest = "; it begins with the rest of one of another shard" if begins_inside else ""
    say(f"{len(starts):,} documents begin in it{mean}{rest}; largest token {largest}")
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
    from shardrun.data.tokenize import load_tokenizer
    from speedrun.data import fineweb

    if named:
        fineweb.require("tokenizers", "decoding")
        return load_tokenizer(named)
    try:
        beside = shard.parent / "tokenizer.json"
        path = beside if beside.is_file() else fineweb.cached_gpt2_tokenizer()
        return load_tokenizer(path) if path else None
    except ImportError:
        return None


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
