"""Folders of text: every file is a document, is converted, or is named; what the report says is what happened."""

import errno
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from speedrun.config import DataConfig
from speedrun.data import open_data
from speedrun.data.documents import read_folder

TEXT = "Die Gräfin kaufte fünf Äpfel. " * 40
SHIFT_JIS = "こんにちは、世界。" * 5


def left_out(folder: Path, **options: str) -> dict[str, list[str]]:
    return read_folder(folder, **options)[1].left_out


def test_files_become_documents(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "one.txt").write_bytes("naïve".encode())
    (tmp_path / "b.txt").write_bytes(b"sorted as b/one.txt is: by the whole name")
    (tmp_path / "a.md").write_bytes(b"windows\r\nlines")
    (tmp_path / "z.py").write_bytes(b"z")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\t")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_bytes(b"hidden")
    (tmp_path / ".git" / "config").write_bytes(b"config")
    documents, report = read_folder(tmp_path)
    assert documents == [
        b"windows\r\nlines",
        b"sorted as b/one.txt is: by the whole name",
        "naïve".encode(),
        b"z",
    ]
    assert (report.files, report.documents, report.text_bytes) == (4, 4, sum(map(len, documents)))
    assert report.left_out == {
        "hidden (the name begins with a dot)": [".git", ".hidden"],
        "empty": ["blank.txt", "empty.txt"],
        "a picture (PNG)": ["picture.png"],
    }
    assert report.lines()[0] == f"read 4 files: 4 documents, {report.text_bytes} bytes"
    assert "left out blank.txt, empty.txt: empty" in report.lines()
    assert report.in_short().startswith("text: 4 documents from 4 files; 5 left out: blank.txt, empty.txt, picture.png")


def test_each_encoding_with_a_mark_is_read(tmp_path: Path) -> None:
    codecs = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")
    for codec in codecs:
        mark = "" if codec in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
        (tmp_path / f"{codec}.txt").write_bytes((mark + codec + TEXT).encode(codec))
    (tmp_path / "plain.txt").write_text("\u3000" + TEXT, encoding="utf-8")
    documents, report = read_folder(tmp_path)
    assert documents == [
        ("\u3000" + TEXT).encode(),
        *((codec + TEXT).encode() for codec in sorted(codecs, key="{}.txt".format)),
    ]
    assert report.converted == {"UTF-16": 3, "UTF-32": 2, "UTF-8 with a byte order mark": 1}
    (tmp_path / "cut.txt").write_bytes(TEXT.encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"cut.txt is not text in utf-16 \(byte .* at position .*give its encoding"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        ("latin-1", TEXT),
        ("cp1252", "„Äpfel“ – 3 €"),
        ("shift_jis", SHIFT_JIS),
        ("iso2022_jp", SHIFT_JIS),
        ("utf-16-le", TEXT),
    ],
)
def test_another_encoding_is_refused_or_said(tmp_path: Path, codec: str, text: str) -> None:
    """iso2022_jp is ASCII by its bytes, and UTF-16 without a mark has NUL bytes: neither may pass for another."""
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    (tmp_path / "b.txt").write_text(TEXT + "ß", encoding="utf-8")
    (tmp_path / "c.txt").write_text("ASCII", encoding="ascii" if codec != "utf-16-le" else codec)
    if codec == "utf-16-le":
        why = "NUL bytes, as UTF-16 without a byte order mark has them: if it is that, give --encoding utf-16-le"
        assert left_out(tmp_path) == {why: ["a.txt", "c.txt"]}
    elif codec != "iso2022_jp":  # nobody can know of that one
        with pytest.raises(ValueError, match=r"a.txt is not UTF-8 \(byte 0x.. at position .*--encoding .*cp1252"):
            read_folder(tmp_path)
    documents, report = read_folder(tmp_path, codec)
    assert [document.decode() for document in documents] == [text, TEXT + "ß", "ASCII"]
    assert report.converted == {codec: 2 if codec == "utf-16-le" else 1}
    assert f"1 converted from {codec}" in report.in_short() or codec == "utf-16-le"


def test_half_of_a_character_is_no_text(tmp_path: Path) -> None:
    """Some codecs let half of a surrogate pair through, which UTF-8 cannot hold."""
    (tmp_path / "a.txt").write_bytes(b"fine, \\ud83d not")
    with pytest.raises(ValueError, match="a.txt is not text in unicode_escape: give its encoding"):
        read_folder(tmp_path, "unicode_escape")


@pytest.mark.parametrize("encoding", ["latin1000", "base64", "rot13", "cp1252\0"])
def test_an_encoding_that_is_none(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="The encoding .* is not known: write one such as cp1252"):
        read_folder(tmp_path, encoding)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
            "a Git LFS pointer, not the file itself",
        ),
        (b"\x93NUMPY\x01\0", "a NumPy array"),
        (b"\x1f\x8b\x08", "compressed (gzip): unpack it"),
        (b"PK\x03\x04", "an archive (zip"),
        (b"%PDF-1.7 and all of it ASCII", "a PDF"),
        ((20240520).to_bytes(4, "little") + b"\x01\0\0\0", "a shard of tokens"),
        (b"some text\0and more", "binary: it holds NUL bytes"),
    ],
)
def test_what_holds_no_text_is_recognised(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "x.dat").write_bytes(content)
    (tmp_path / "a.txt").write_bytes(b"text")
    for encoding in ("", "latin-1", "cp1252"):
        ((found, names),) = left_out(tmp_path, encoding=encoding).items()
        assert found.startswith(why) and names == ["x.dat"]


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
def test_links_are_followed_once(tmp_path: Path) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    for folder in (source / "real", other / "deep"):
        folder.mkdir(parents=True)
    (source / "real" / "a.txt").write_text("a")
    (other / "b.txt").write_text("b")
    (other / "deep" / "c.txt").write_text("c")
    (source / "again").symlink_to(source / "real")  # sorted before what it points to
    (source / "one").symlink_to(other)
    (source / "two").symlink_to(other / "deep")
    (source / "up").symlink_to(tmp_path)
    (source / "self").symlink_to(source)
    (other / "deep" / "ring").symlink_to(other)
    (source / "file.txt").symlink_to(other / "b.txt")
    (source / "nowhere").symlink_to(tmp_path / "nothing")
    (source / "to_itself").symlink_to(source / "to_itself")
    os.mkfifo(source / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(source / "socket"))
    documents, report = read_folder(source)
    assert documents == [b"b", b"b", b"c", b"a"]  # file.txt, one/b.txt, one/deep/c.txt, real/a.txt
    assert report.copies == 1
    assert {why: sorted(names) for why, names in report.left_out.items()} == {
        "a folder that is read under another name": ["again", "one/deep/ring", "two"],
        "a link back to a folder that it is in": ["self", "up"],
        "a link that leads nowhere": ["nowhere", "to_itself"],
        "no regular file but a pipe, a socket or a device": ["pipe", "socket"],
    }


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything, so be somebody else for a while."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])  # nothing; its names alone; what one knows the name of
def test_a_folder_that_cannot_be_read_is_an_error(mode: int, linked: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, real = Path(name) / "source", Path(name) / "elsewhere"
        locked = (real if linked else source) / "locked"
        locked.mkdir(parents=True)
        source.mkdir(exist_ok=True)
        os.chmod(name, 0o755)
        (source / "a.txt").write_text("text")
        (locked / "b.txt").write_text("more")
        if linked:  # to the folder, or into it
            (source / "link").symlink_to(locked / "b.txt" if mode == 0 else locked)
        locked.chmod(mode)
        try:
            with unprivileged(), pytest.raises(ValueError, match=r"/(locked|link)(/b.txt)? cannot be read .*denied"):
                read_folder(source)
        finally:
            locked.chmod(0o755)
        assert len(read_folder(source)[0]) == 2


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything but a link to nothing is somebody's text."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    stat = Path.stat

    def fail(path: Path, **options: Any) -> os.stat_result:
        if path.name == "b.txt" and options.get("follow_symlinks", True):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(ValueError, match=r"b.txt cannot be read \(Input/output error\): make it readable"):
        read_folder(tmp_path)


def test_a_tokenizer_in_the_folder_is_no_document(tmp_path: Path) -> None:
    for name in ("a.txt", "tokenizer.json", "tokenizer_config.json", "tokens.json"):
        (tmp_path / name).write_text('{"version": "1.0"}')
    documents, report = read_folder(tmp_path)
    assert len(documents) == 1
    assert report.left_out == {"of a tokenizer, no text": ["tokenizer.json", "tokenizer_config.json", "tokens.json"]}


def test_lines_of_json_are_documents(tmp_path: Path) -> None:
    lines = (
        '{"text": "eins ü", "id": 1}\n\n{"text": ""}\n{"text": null}\r\n{"id": 2, "text": "zwei\\u0000\\u2028\u2028"}'
    )
    for name, codec in (("a.jsonl", "utf-8"), ("b.JSONL", "utf-8-sig"), ("c.ndjson", "utf-16"), ("d.jsonl", "cp1252")):
        (tmp_path / name).write_bytes(lines.replace("\u2028" if codec == "cp1252" else "\0", "").encode(codec))
    documents, report = read_folder(tmp_path, "cp1252")
    whole = ["eins ü".encode(), "zwei\0\u2028\u2028".encode()]
    assert documents == [*whole * 3, "eins ü".encode(), "zwei\0\u2028".encode()]
    assert (report.files, report.documents, report.empty_documents, report.left_out) == (4, 8, 8, {})
    assert report.converted == {"UTF-8 with a byte order mark": 1, "UTF-16": 1, "cp1252": 1}
    assert "left out 8 lines or rows without text" in report.lines()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"Line 2 of .*x.jsonl is not JSON \(.*one JSON object per line"),
        (b"[" * 100_000, "Line 2 of .*x.jsonl is not JSON .nested too deeply"),
        (b'"text"', "is not a JSON object with a field 'text', but a string: .*--text-field"),
        (
            b'{"content": "a", "id": 1}',
            r"has no field 'text' \(it has 'content', 'id'\): .*--text-field .*--data.text-f",
        ),
        (b"{}", r"\(it has none\)"),
        (b'{"text": ["a"]}', "has a list in the field 'text', not text"),
        (b'{"text": "\\ud83d"}', r"holds '\\ud83d', half of a character"),
        (b'{"text": "\xe4"}', r"x.jsonl is not UTF-8 \(byte 0xe4 at position .*: name its encoding with --encoding"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message) as error:
        read_folder(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"content": "a", "text": 1}\n')
    assert read_folder(tmp_path, text_field="content")[0] == [b"a"]


def parquet(path: Path, **columns: Any) -> None:
    table = pytest.importorskip("pyarrow").table(columns)
    pytest.importorskip("pyarrow.parquet").write_table(table, path)


def test_rows_of_parquet_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet(tmp_path / "a.parquet", text=["ünö", "", None, "zwei"], id=[1, 2, 3, 4])
    categories = pyarrow.array(["x", "y", "x"]).dictionary_encode()
    parquet(tmp_path / "b.parquet", text=categories)
    documents, report = read_folder(tmp_path)
    assert documents == ["ünö".encode(), b"zwei", b"x", b"y", b"x"]
    assert (report.files, report.empty_documents, report.copies) == (2, 2, 1)
    parquet(tmp_path / "c.parquet", content=["x"], text=[1])
    with pytest.raises(
        ValueError, match="c.parquet has no text in its column 'text' .int64.; its columns are 'content', 't"
    ):
        read_folder(tmp_path)
    with pytest.raises(
        ValueError, match="a.parquet has no column 'content'; its columns are 'text', 'id': .*--text-field"
    ):
        read_folder(tmp_path, text_field="content")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    with pytest.raises(ValueError, match="a.parquet cannot be read as Parquet .*: fetch or write it again"):
        read_folder(tmp_path)


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and so on")
    (tmp_path / "named_otherwise").write_bytes(b"PAR1 and so on")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match="a.parquet is Parquet; pyarrow .* is not installed: pip install 'shardrun.parquet"
    ):
        read_folder(tmp_path)
    (tmp_path / "a.parquet").write_text("text, in truth")
    assert left_out(tmp_path) == {"Parquet: let its name end in .parquet": ["named_otherwise"]}


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    real = os.listdir

    def refuse(path: Any) -> list[str]:
        if path == tmp_path / "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ValueError, match=r"locked cannot be read \(Permission denied\): make it readable"):
        read_folder(tmp_path)


def test_a_folder_of_nothing_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(
        ValueError, match=r"holds no text file .*left out a.npy: a NumPy array.*`shardrun data convert /"
    ):
        read_folder(tmp_path)
    (tmp_path / "a.npy").write_bytes("a".encode("utf-16-le") * 20)
    with pytest.raises(ValueError, match="holds no text file .*NUL bytes, as UTF-16 .*: put text files there"):
        read_folder(tmp_path)


def test_the_trainer_says_it_in_a_line(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 200)
    config = DataConfig(source=str(tmp_path), sequence_length=16, global_batch=4, eval_tokens=64)
    assert open_data(config, 257, 0).note == (
        "held out for validation: 72 of 1,200 bytes of text (6.0%), the end of a document, as each is too large to be "
        "held out whole; 1,128 to train on"
    )
    (tmp_path / "3.txt").write_bytes(TEXT.encode("utf-16"))
    (tmp_path / "4.txt").write_bytes(TEXT.encode("cp1252"))
    (tmp_path / "5.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="4.txt is not UTF-8"):
        open_data(config, 257, 0)
    data = open_data(DataConfig(**{**vars(config), "encoding": "cp1252"}), 257, 0)
    assert data.note.startswith(
        "text: 5 documents from 5 files; 1 converted from UTF-16; 1 converted from cp1252; 1 copy, counted once; "
        "1 left out: 5.png ("
    )
