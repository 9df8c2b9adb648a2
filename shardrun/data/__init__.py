"""`shardrun data`: fetch FineWeb's shards, make shards of text or of others' tokens, look into shards and folders."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from shardrun.help import add_parser
from strategies import strict_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, about: str) -> argparse.ArgumentParser:
        added = add_parser(actions, name, about)
        added.add_argument("--json", action="store_true", help="print JSON")
        return added

    fineweb = action("fineweb", "fetch FineWeb in GPT-2 tokens from the Hugging Face hub; run it again to continue")
    fineweb.add_argument("--shards", type=int, default=9, help="training shards of 100M tokens, 200 MB (default: 9)")
    fineweb.add_argument("--out", type=Path, default=Path("data/fineweb10B"), help="default: data/fineweb10B")

    def text_options(to: argparse.ArgumentParser) -> None:
        to.add_argument("--encoding", default="", help="of text that is not UTF-8: cp1252, latin-1, shift_jis, …")
        to.add_argument("--text-field", default="text", help="of .jsonl lines and .parquet rows (default: text)")

    tokenize = action("tokenize", "write a folder of text as .bin shards of BPE tokens, 6 % of it held out")
    tokenize.add_argument(
        "folder",
        type=Path,
        help="every file below it is a document; of a .jsonl each line is one, of a .parquet each row",
    )
    tokenize.add_argument("--out", type=Path, help="where the shards go (default: data/NAME OF FOLDER)")
    tokenize.add_argument(
        "--tokenizer", type=Path, help="a tokenizer.json (default: GPT-2's, fetched once from the hub)"
    )
    tokenize.add_argument("--lossy", action="store_true", help="take a tokenizer that does not give the text back")
    tokenize.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    tokenize.add_argument("--shard-tokens", type=int, default=100_000_000, help="default: 100,000,000")
    text_options(tokenize)

    convert = action(
        "convert", "write tokens of nanoGPT (.bin without a header) or build-nanogpt (.npy) as .bin shards"
    )
    convert.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="files, or a folder of them")
    convert.add_argument("--out", type=Path, required=True, help="where the shards go")
    convert.add_argument("--tokenizer", type=Path, help="the tokenizer.json that made them")
    convert.add_argument("--vocab-size", type=int, help="default: GPT-2's 50257; 128256, Llama 3's, for uint32")
    convert.add_argument(
        "--document-start", type=int, help="the token between documents (default: GPT-2's 50256; else one more)"
    )
    convert.add_argument("--dtype", choices=("uint16", "uint32"), help="of files without a header (default: uint16)")

    inspect = action("inspect", "check .bin shards, or a folder of text, and say what is in them")
    inspect.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a .bin shard, or a folder")
    inspect.add_argument(
        "--vocab-size", type=int, help="tokens must be below it (default: what tokens.json says, or GPT-2's 50257)"
    )
    inspect.add_argument(
        "--tokenizer",
        type=Path,
        help="to decode with (default: tokenizer.json beside FILE, or GPT-2's if fetched before)",
    )
    text_options(inspect)


def run(arguments: argparse.Namespace) -> int:
    from shardrun.data.inspect import inspect_all

    show = {"fineweb": _fineweb, "tokenize": _tokenize, "convert": _convert, "inspect": inspect_all}[arguments.action]
    content = show(arguments, (lambda line: None) if arguments.json else lambda line: print(line, flush=True))
    if arguments.json:
        print(strict_json.dumps({"schema": 2 if arguments.action == "inspect" else 1, **content}, indent=2))
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
    from speedrun.data.text import held_out_in_words

    if not arguments.folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(arguments.folder)!r}: name one that holds text files.")
    fineweb.require("tokenizers", "BPE")
    out = arguments.out or Path("data") / arguments.folder.resolve().name
    tokenizer = arguments.tokenizer or fineweb.gpt2_tokenizer()
    started = perf_counter()
    with _bar() as progress:
        done = tokenize(
            arguments.folder,
            out,
            tokenizer,
            arguments.processes,
            arguments.shard_tokens,
            progress,
            encoding=arguments.encoding,
            text_field=arguments.text_field,
            lossy=arguments.lossy,
        )
    seconds = perf_counter() - started
    for line in done.report.lines():
        say(line)
    say(held_out_in_words(done.text_bytes - done.held_out_bytes, done.held_out_bytes, cut=done.cut))
    whose = done.vocabulary
    say(f"vocabulary: {whose.size:,} tokens ({whose.dtype}), {whose.document_start} before each document")
    if done.uncut:
        say(f"encoded whole, in more memory, as the tokenizer has no place to cut them: {', '.join(done.uncut[:3])}")
    if done.loss:
        say(f"LOST, as --lossy allows: {done.loss.in_words()}")
    else:
        form = min(done.loss.other_form, done.documents)  # one that is cut counts twice
        but = f" (in {form:,} of them in another Unicode form, or with a space before it)" if form else ""
        say(f"round trip: decoded, all {done.documents:,} documents are the text again{but}")
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


def _convert(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    from shardrun.data.convert import convert
    from speedrun.data import fineweb

    if arguments.tokenizer:
        fineweb.require("tokenizers", "reading its file")
    done = convert(
        arguments.sources,
        arguments.out,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        document_start=arguments.document_start,
        dtype=arguments.dtype,
        say=say,
    )
    whose = done.vocabulary
    say(
        f"vocabulary: {whose.size:,} tokens ({whose.dtype}), {whose.document_start} before each document; the largest "
        f"token there is {done.largest_token:,}"
    )
    say(
        f"{arguments.out}: {done.documents:,} documents, {done.tokens:,} tokens in {len(done.shards)} shards. Train "
        f"with --data.source {arguments.out}"
    )
    return {"folder": str(arguments.out), **asdict(done), "shards": [str(path) for path in done.shards]}


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
