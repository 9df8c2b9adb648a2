"""A folder holds anything: each file is read or converted exactly, named as left out, or refused in a sentence."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from speedrun.data.documents import read_folder

NAMES = ("a.txt", "b.md", "c", "d.jsonl", "e.parquet", "f.bin.txt")
CODECS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "shift_jis", "utf-16-be", "iso2022_jp")
quickly = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "text"


def write(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def encoded(text: str, codec: str) -> bytes:
    try:
        return text.encode(codec)
    except UnicodeEncodeError:
        return text.encode()


ANY = st.one_of(
    st.binary(max_size=80),
    st.builds(encoded, st.text(max_size=40), st.sampled_from(CODECS)),
    st.builds(lambda value: json.dumps(value).encode(), st.dictionaries(st.sampled_from(["text", "b"]), st.text())),
    st.builds(lambda head, tail: head + tail, st.sampled_from([b"PAR1", b"\xff\xfe", b"\xef\xbb\xbf"]), st.binary()),
)


@quickly
@given(st.dictionaries(st.sampled_from(NAMES), ANY, min_size=1), st.sampled_from(["", *CODECS]))
def test_any_files(folder: Path, files: dict[str, bytes], encoding: str) -> None:
    write(folder, files)
    try:
        documents, report = read_folder(folder, encoding)
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return
    assert report.files + sum(map(len, report.left_out.values())) >= len(files) - bool(report.empty_documents)
    assert all(document.decode().strip(" \t\n\r\x0b\x0c") for document in documents)
    assert report.text_bytes == sum(map(len, documents)) and report.documents == len(documents)
    # A file that is a document and was not converted is there to the byte.
    plain = {content for name, content in files.items() if name not in ("d.jsonl", "e.parquet")}
    converted = sum(report.converted.values())
    lines = sum(name in files for name in ("d.jsonl", "e.parquet"))
    assert sum(document in plain for document in documents) >= report.files - converted - lines


@quickly
@given(st.text(min_size=1), st.sampled_from(CODECS))
@example("\ufeffa", "utf-8")
@example("Ã¤", "latin-1")  # its bytes are valid UTF-8, of another letter
@example("a\0b", "utf-16")
def test_text_comes_back_exactly_or_is_named(folder: Path, text: str, codec: str) -> None:
    """Saved in the encoding that is named: the text is what was saved, unless it holds NUL or passes for another."""
    try:
        content = text.encode(codec)
        assert content.decode(codec) == text
    except (UnicodeError, AssertionError):
        return
    write(folder, {"a.txt": content, "b.txt": b"x"})
    try:
        documents, report = read_folder(folder, codec)
    except ValueError as error:
        assert (
            codec not in ("utf-8", "utf-8-sig", "utf-16", "utf-32") and "a.txt" in str(error) or "b.txt" in str(error)
        )
        return
    said = {name for names in report.left_out.values() for name in names}
    if "a.txt" in said:
        assert not text.encode().strip() or "\0" in text or text.startswith(("PAR1", "GIF", "%PDF-", "{\\rtf"))
        return
    passes = documents[0].decode() != text
    if passes:  # only by a byte order mark, or as UTF-8 that is not ASCII
        assert (
            content[:2] in (b"\xff\xfe", b"\xfe\xff")
            or content.startswith(b"\xef\xbb\xbf")
            or (not content.isascii() and content.decode("utf-8") == documents[0].decode())
        )
