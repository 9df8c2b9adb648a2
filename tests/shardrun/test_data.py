"""The verb `shardrun data`: what it prints, what it refuses. (The download: tests/data/test_fineweb.py.)"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shardrun.__main__ import main
from speedrun.data.shards import write_tokens

EOT = 50256


def shardrun(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["data", *map(str, arguments)])
    output = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, output.out, output.err


@pytest.fixture
def byte_tokenizer(tmp_path: Path) -> Path:
    """Bytes as tokens, in the form of a tokenizer file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "bytes.json"))
    return tmp_path / "bytes.json"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPT-2 tokenizer at hand, whatever this machine has fetched before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_tokenize_and_inspect(
    byte_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories").mkdir()
    texts = ["naïve", *(f"number {number}" for number in range(10, 24))]
    for number, text in enumerate(texts):
        (tmp_path / "stories" / f"{number}.txt").write_text(text)
    code, out, _ = shardrun(capsys, "tokenize", "stories", "--tokenizer", byte_tokenizer, "--processes", 1, "--json")
    done = json.loads(out)
    assert code == 0 and done["schema"] == 1 and done["folder"] == "data/stories"
    assert (done["documents"], done["text_bytes"], done["tokens"]) == (15, 6 + 14 * 9, 15 + 6 + 14 * 9)
    assert done["held_out_bytes"] in (9, 15) and not done["cut"]
    assert done["shards"] == ["data/stories/text_val_000000.bin", "data/stories/text_train_000001.bin"]

    code, out, _ = shardrun(capsys, "inspect", done["shards"][1], "--json")
    (train,) = json.loads(out)["shards"]
    assert code == 0 and train["documents"] in (13, 14) and train["first_document_text"] in texts
    assert train["first_document_tokens"] == len(train["first_document_text"].encode())
    assert (train["magic"], train["version"], train["bytes"]) == (20240520, 1, 1024 + 2 * train["tokens"])
    # The tokenizer has no special token: the one behind its 256 begins a document.
    assert (train["vocab_size"], train["document_start"], train["dtype"]) == (257, 256, "uint16")
    code, out, _ = shardrun(capsys, "inspect", done["shards"][0])
    assert code == 0 and " documents begin in it" in out and "First document" in out

    code, out, error = shardrun(capsys, "tokenize", "stories", "--tokenizer", byte_tokenizer)
    assert code == 2 and "holds .bin shards already" in error
    code, out, error = shardrun(capsys, "tokenize", "nothing")
    assert code == 2 and error == "shardrun: error: There is no folder 'nothing': name one that holds text files.\n"


def test_inspect_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokens(tmp_path / "a.bin", np.array([7, 8, EOT, 1, 2, 3, EOT, EOT, 4]))
    code, out, _ = shardrun(capsys, "inspect", tmp_path / "a.bin", "--json")
    (shown,) = json.loads(out)["shards"]
    assert code == 0 and (shown["tokens"], shown["documents"], shown["largest_token"]) == (9, 3, EOT)
    assert shown["begins_in_mid_document"] and shown["first_document_tokens"] == 3
    assert shown["first_document_text"] is None
    _, out, _ = shardrun(capsys, "inspect", tmp_path / "a.bin")
    assert "3 documents begin in it" in out and "the rest of one of another shard" in out and "No tokenizer" in out

    write_tokens(tmp_path / "b.bin", np.array([7, 8]))  # the middle of a document
    code, out, _ = shardrun(capsys, "inspect", tmp_path / "b.bin", tmp_path / "a.bin", "--json")
    both = json.loads(out)["shards"]
    assert [(shown["documents"], shown["first_document_tokens"]) for shown in both] == [(0, 2), (3, 3)]
    assert [shown["file"] for shown in both] == [str(tmp_path / "b.bin"), str(tmp_path / "a.bin")]

    code, out, error = shardrun(capsys, "inspect", tmp_path / "a.bin", tmp_path / "c.bin")
    assert code == 2 and out == "" and "c.bin" in error


def test_inspect_a_folder_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes("fünf".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("sechs".encode("utf-16"))
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    code, out, error = shardrun(capsys, "inspect", tmp_path)
    assert code == 2 and out == "" and "a.txt is not UTF-8" in error and "--encoding" in error
    code, out, _ = shardrun(capsys, "inspect", tmp_path, "--encoding", "latin-1")
    assert code == 0 and out.splitlines() == [
        f"{tmp_path}: a folder of text",
        "  read 2 files: 2 documents, 10 bytes",
        "  converted to UTF-8: 1 file in latin-1",
        "  converted to UTF-8: 1 file in UTF-16",
        "  left out c.png: a picture (PNG)",
    ]
    code, out, _ = shardrun(capsys, "inspect", tmp_path, "--encoding", "latin-1", "--json")
    shown = json.loads(out)
    assert shown["schema"] == 2 and shown["shards"] == []
    assert shown["folders"][0]["left_out"] == {"a picture (PNG)": ["c.png"]}


def shard(magic: int = 20240520, version: int = 1, count: int = 3, body: bytes = b"123456") -> bytes:
    return struct.pack("<3i", magic, version, count) + bytes(1012) + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (shard(magic=1), "begins with 1, not with the magic number 20240520"),
        (shard(version=2), "has version 2, only 1 can be read"),
        (shard(count=4), "holds 3 tokens but its header promises 4 (the file has 1030 bytes, not 1032)"),
        (shard(body=b"12345"), "has 5 bytes of tokens, an odd number"),
        (
            shard(body=struct.pack("<3H", EOT, 50257, 1)),
            "holds token 50257 at position 1, outside the vocabulary of 50257",
        ),
    ],
)
def test_inspect_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    code, out, error = shardrun(capsys, "inspect", path)
    assert code == 2 and out == "" and error.count("\n") == 1
    assert error.startswith(f"shardrun: error: Shard {path} ") and message in error
    path.unlink()
    assert "There is no file" in shardrun(capsys, "inspect", path)[2]


def test_vocabularies_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokens(tmp_path / "a.bin", np.array([EOT, 50300]))
    assert shardrun(capsys, "inspect", tmp_path / "a.bin", "--vocab-size", 50304)[0] == 0


def test_without_tokenizers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, _, error = shardrun(capsys, "tokenize", tmp_path)
    assert code == 2 and "tokenizers is not installed" in error and "pip install 'shardrun[data]'" in error
    write_tokens(tmp_path / "a.bin", np.array([EOT, 1]))
    (tmp_path / "tokenizer.json").write_text("{}")
    code, out, _ = shardrun(capsys, "inspect", tmp_path / "a.bin")  # says all that it can
    assert code == 0 and "No tokenizer at hand" in out
