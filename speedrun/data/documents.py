"""A folder of text, read whole: every file below it is read, converted, or named as left out.

A file is one document. Each line of a .jsonl file and each row of a .parquet file is one too. Documents come in the
order of their files' relative paths, as UTF-8 (`speedrun.data.encodings` says from what).
"""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from speedrun.data.encodings import check_encoding, decode, encoding_of, readable, why_it_has_nul
from speedrun.data.kinds import convert_command, recognised
from speedrun.data.records import json_lines, parquet_rows
from speedrun.data.report import TextReport
from speedrun.data.vocabulary import SIDECAR
from strategies.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", SIDECAR)
"""Lie beside text and shards, and are no documents."""


def read_folder(folder: Path, encoding: str = "", text_field: str = "text") -> tuple[list[bytes], TextReport]:
    """Every document below `folder`, in memory, and what became of each file. Use shards for more than a few GB.

    Raises ValueError as `read_documents`.
    """
    report = TextReport()
    documents = [document for _, document in read_documents(folder, report, encoding, text_field)]
    report.copies = len(documents) - len(set(documents))
    return documents, report


def read_documents(
    folder: Path, report: TextReport, encoding: str = "", text_field: str = "text"
) -> Iterator[tuple[str, bytes]]:
    """(name, text as UTF-8) of every document below `folder`, one after another. `report` is filled in meanwhile.

    encoding: of files that are not UTF-8 and have no byte order mark, by Python's name for it. text_field: the field of
    .jsonl lines and the column of .parquet rows that holds the text.

    Raises:
        ValueError: no document at all; a file that cannot be read or decoded; an unknown encoding.
    """
    check_encoding(encoding)
    for name, path in files_below(folder, report):
        before = report.documents
        for where, document in _of_file(name, path, report, encoding, text_field):
            report.documents += 1
            report.text_bytes += len(document)
            yield name + where, document
        report.files += report.documents > before
    if not report.documents:
        raise UserError(_nothing(folder, report))


def files_below(folder: Path, report: TextReport) -> list[tuple[str, Path]]:
    """(relative name, path) of every regular file below `folder`, sorted by name.

    What begins with a dot is left out. Links to folders are followed, but no folder is read twice, and none that holds
    `folder` itself.
    """
    root = folder.resolve()
    above = {_identity(path) for path in (root, *root.parents) if os.access(path, os.F_OK)}
    seen: set[tuple[int, int]] = set()
    files: list[tuple[str, Path]] = []
    links: list[tuple[str, Path]] = []
    waiting = [("", folder)]
    while waiting or links:
        if not waiting:  # real folders come first: what is there twice keeps its own name
            waiting.append(links.pop(links.index(min(links))))
            if _identity(waiting[0][1]) in above:
                report.leave_out(waiting.pop()[0], "a link back to a folder that it is in")
                continue
        name, path = waiting.pop()
        if _identity(path) in seen:
            report.leave_out(name, "a folder that is read under another name")
            continue
        seen.add(_identity(path))
        with readable(path):
            entries = sorted(os.listdir(path))
        for entry in entries:
            below, where = f"{name}/{entry}" if name else entry, path / entry
            if entry.startswith("."):
                report.leave_out(below, "hidden (the name begins with a dot)")
                continue
            if entry in TOKENIZER_FILES:
                report.leave_out(below, "of a tokenizer, no text")
                continue
            try:
                kind = where.stat().st_mode
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP) and where.is_symlink():
                    report.leave_out(below, "a link that leads nowhere")
                    continue
                with readable(where):  # nobody knows what there is: a folder that lets no one in, a disk that fails
                    raise
            if stat.S_ISDIR(kind):
                (links if where.is_symlink() else waiting).append((below, where))
            elif stat.S_ISREG(kind):
                files.append((below, where))
            else:
                report.leave_out(below, "no regular file but a pipe, a socket or a device")
    return sorted(files)


def _of_file(name: str, path: Path, report: TextReport, encoding: str, text_field: str) -> Iterator[tuple[str, bytes]]:
    """(what to add to the name, document) of a file. Where there is none, the report says why."""
    suffix, before = path.suffix.lower(), (report.documents, report.empty_documents)
    with readable(path), open(path, "rb") as file:
        head = file.read(64)
    kind = recognised(head)
    if suffix == ".parquet" and head.startswith(b"PAR1"):
        for number, document in parquet_rows(path, report, text_field):
            yield f" row {number}", document
    elif kind:
        report.leave_out(name, kind)
        return
    elif suffix in (".jsonl", ".ndjson"):
        for number, document in json_lines(path, report, encoding, text_field):
            yield f" line {number}", document
    else:
        with readable(path):
            content = path.read_bytes()
        codec, words = encoding_of(content, encoding)
        if codec == "utf-8" and b"\0" in content or "\0" in (text := decode(path, content, codec)):
            report.leave_out(name, why_it_has_nul(content))
            return
        document = content if codec == "utf-8" else text.encode()
        del text  # a large one is in memory as few times as can be
        if document.strip():
            if document != content:
                report.convert(words)
            del content
            yield "", document
    if before == (report.documents, report.empty_documents):
        report.leave_out(name, "empty")


def _nothing(folder: Path, report: TextReport) -> str:
    """Why a folder gives no document, and what to do."""
    missing = "; ".join(report.what_is_missing()[:4])
    arrays = any(why.startswith("a NumPy array") for why in report.left_out)
    way_out = f"make shards with `{convert_command(folder)}`" if arrays else "put text files there"
    found = f" ({missing})" if missing else ""
    return f"{str(folder)!r} holds no text file with anything in it{found}: {way_out}."


def _identity(path: Path) -> tuple[int, int]:
    with readable(path):
        found = os.stat(path)
    return found.st_dev, found.st_ino
