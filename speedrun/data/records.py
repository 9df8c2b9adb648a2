"""Files of many documents: .jsonl, a document in a field of each line, and .parquet, one in a column of each row."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from speedrun.data.encodings import byte_order_mark, decode, encoding_of, readable, undecodable
from speedrun.data.report import TextReport, printable
from strategies.errors import UserError

ROWS_BYTES = 16 << 20
"""Of a Parquet file that are read at once, as its rows are on average."""


def json_lines(path: Path, report: TextReport, encoding: str, text_field: str) -> Iterator[tuple[int, bytes]]:
    """(number of the line from 1, its text as UTF-8) of a file of JSON objects, one per line.

    Raises:
        ValueError: a line that is no such object; bytes that cannot be decoded.
    """
    file, codec, words = _open_lines(path, encoding)
    if words:
        report.convert(words)
    number = 0
    with file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    document = _text_of(line, f"Line {number:,} of {printable(str(path))}", text_field)
                    if document.strip():
                        yield number, document
                    else:
                        report.empty_documents += 1
        except UnicodeDecodeError as error:
            raise undecodable(path, error, codec, f" of a piece behind line {number:,}") from error


def parquet_rows(path: Path, report: TextReport, text_field: str) -> Iterator[tuple[int, bytes]]:
    """(number of the row from 1, its text as UTF-8) of a Parquet file.

    Raises:
        ValueError: pyarrow is not installed; a damaged file; no such column of text.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{printable(str(path))} is Parquet; pyarrow reads it, and is not installed: pip install "
            "'shardrun[parquet]'."
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, text_field)
            number = 0
            rows_at_once = max(1, min(1024, ROWS_BYTES * file.metadata.num_rows // (path.stat().st_size + 1)))
            for batch in file.iter_batches(batch_size=rows_at_once, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    document = (text or "").encode()
                    if document.strip():
                        yield number, document
                    else:
                        report.empty_documents += 1
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{printable(str(path))} cannot be read as Parquet ({why}): fetch or write it again."
        ) from error


def _open_lines(path: Path, encoding: str) -> tuple[TextIO, str, str]:
    """The file's lines, decoded, its codec and the name of that (`encoding_of`)."""
    with readable(path):
        with open(path, "rb") as file:
            marked = byte_order_mark(file.read(4))
        if encoding and not marked:  # only the whole says whether it is UTF-8 after all
            content = path.read_bytes()
            codec, words = encoding_of(content, encoding)
            text = decode(path, content, codec)
            return io.StringIO(text, newline="\n"), codec, words if text.encode() != content else ""
        codec, words = marked or ("utf-8", "")
        return open(path, encoding=codec, newline="\n"), codec, words


def _text_of(line: str, where: str, text_field: str) -> bytes:
    """What a line's field says; nothing where it is null."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{where} is not JSON ({why}): a .jsonl file has one JSON object per line.") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object with a field {text_field!r}, but {_kind(value)}: {_WAY_OUT}")
    if text_field not in value:
        fields = ", ".join(ascii(name[:40]) for name in list(value)[:6]) or "none"
        raise UserError(f"{where} has no field {text_field!r} (it has {fields}): {_WAY_OUT}")
    text = value[text_field]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise UserError(f"{where} has {_kind(text)} in the field {text_field!r}, not text: {_WAY_OUT}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UserError(f"{where} holds {half}, half of a character: write the whole pair, or take it out.") from error


_WAY_OUT = "name the one with the text by --text-field (of the trainer: --data.text-field)."


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _check_column(path: Path, schema: Any, text_field: str) -> None:
    """Raise ValueError where a Parquet file has no such column of text."""
    import pyarrow

    kind = schema.field(text_field).type if text_field in schema.names else None
    if kind is not None and pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pyarrow.string(), pyarrow.large_string()):
        there = f"no text in its column {text_field!r} ({kind})" if kind is not None else f"no column {text_field!r}"
        names = ", ".join(ascii(name[:40]) for name in schema.names[:6])
        raise UserError(f"{printable(str(path))} has {there}; its columns are {names}: {_WAY_OUT}")
