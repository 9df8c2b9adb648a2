"""Tokens that others have written: recognised, and converted by the command that the refusal gives."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from speedrun.config import DataConfig
from speedrun.data import Data, open_data
from speedrun.data.shards import open_shard, write_tokens
from speedrun.data.vocabulary import LLAMA3
from tests.shardrun.test_data import shardrun

EOT = 50256


def opened(folder: Path, vocab_size: int = 50257) -> Data:
    return open_data(DataConfig(source=str(folder), sequence_length=2, global_batch=1, eval_tokens=2), vocab_size, 0)


def shards(folder: Path, split: str) -> list[int]:
    return np.concatenate([open_shard(path) for path in sorted(folder.glob(f"tokens_{split}_*.bin"))]).tolist()


def documents(tokens: list[int], start: int) -> list[list[int]]:
    found: list[list[int]] = []
    for token in tokens:
        if token == start:
            found.append([])
        else:
            found[-1].append(token)
    return found


@pytest.mark.parametrize("kind", ["nanoGPT", "build-nanogpt"])
def test_the_refusal_gives_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """nanoGPT ends each document with <|endoftext|>, build-nanogpt begins it so: the documents are the same."""
    monkeypatch.setattr("shardrun.data.convert.SHARD_TOKENS", 400)
    folder = tmp_path / "a folder"
    folder.mkdir()
    texts = {"train": [[1, 2, 3], [4], [5, 50255, *range(600)]], "val": [[*range(600)]]}
    for split, of_split in texts.items():
        if kind == "nanoGPT":
            np.array([token for text in of_split for token in (*text, EOT)], dtype="<u2").tofile(
                folder / f"{split}.bin"
            )
        else:
            flat = np.array([token for text in of_split for token in (EOT, *text)], dtype=np.uint16)
            np.save(folder / f"edufineweb_{split}_000001.npy", flat)
    with pytest.raises(ValueError, match="`shardrun data convert") as refused:
        opened(folder)
    command = shlex.split(re.search("`shardrun data (convert .*?)`", str(refused.value))[1])  # type: ignore[index]
    code, out, error = shardrun(capsys, *command)
    assert code == 0, error
    done = Path(f"{folder}-shards")
    assert f"Train with --data.source {done}" in out and "1 document\n" in out and "3 documents\n" in out
    assert {split: documents(shards(done, split), EOT) for split in texts} == texts
    assert len(list(done.glob("tokens_train_*.bin"))) > 1
    data = opened(done)
    assert (data.document_start, data.train_tokens) == (EOT, 609 + 1)  # a shard begins in mid-document


def test_other_vocabularies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        np.arange(65, dtype="<u2").tofile(tmp_path / f"{split}.bin")  # nanoGPT's characters of Shakespeare
    code, out, _ = shardrun(capsys, "convert", tmp_path, "--out", tmp_path / "a", "--vocab-size", 65, "--json")
    assert code == 0 and json.loads(out)["vocabulary"] == {"size": 66, "document_start": 65, "tokenizer_sha256": ""}
    assert shards(tmp_path / "a", "train") == [65, *range(65)] and opened(tmp_path / "a", 66).document_start == 65
    code, _, error = shardrun(capsys, "convert", tmp_path, "--out", tmp_path / "b", "--vocab-size", 64)
    assert code == 2 and "val.bin holds token 64 at position 64, outside the vocabulary of 64" in error
    code, out, _ = shardrun(
        *(capsys, "convert", tmp_path / "train.bin", tmp_path / "val.bin", "--out", tmp_path / "c"),
        *("--vocab-size", 65, "--document-start", 0),
    )
    assert code == 0 and shards(tmp_path / "c", "val") == list(range(65))
    # Tokens of 4 bytes are Llama 3's, if nobody says otherwise.
    for split in ("train", "val"):
        np.save(tmp_path / f"{split}.npy", np.array([128_000, 128_255, 3], dtype=np.int64))
        (tmp_path / f"{split}.bin").unlink()
    code, out, _ = shardrun(capsys, "convert", tmp_path, "--out", tmp_path / "d")
    assert code == 0 and "128,256 tokens (uint32)" in out and opened(tmp_path / "d", 128_256).document_start == 128_000


def test_llm_c_shards_are_read_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        write_tokens(tmp_path / f"TinyStories_{split}.bin", np.array([128_000, 1, 2, 3]), LLAMA3)
    assert opened(tmp_path, 128_256).document_start == 128_000
    code, out, _ = shardrun(capsys, "inspect", tmp_path)
    assert code == 0 and out.count("magic 20240801, version 7, 4 tokens (uint32)") == 2


@pytest.mark.parametrize(
    ("names", "content", "message"),
    [
        (["train.bin"], b"12", "1 files with train in their name and 0 with val"),
        (["train.bin", "val.bin"], b"123", "has 3 bytes, no whole number of tokens of 2 bytes"),
        (["train.bin", "val.bin"], b"", "has 0 bytes"),
        (["train.bin", "val.bin"], b"\xff\xff", "holds token 65535 at position 0, outside the vocabulary of 50257"),
        (["train.npy", "val.npy"], b"\x93NUMPY and no more", "cannot be read as a NumPy array"),
        (["train.npy", "val.npy"], bytes(2000), "it is not a shard"),
    ],
)
def test_what_cannot_be_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], content: bytes, message: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(content)
    code, out, error = shardrun(capsys, "convert", tmp_path, "--out", tmp_path / "out")
    assert code == 2 and out == "" and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_never_over_shards_and_never_by_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "val.npy", np.array([{}], dtype=object))
    np.save(tmp_path / "train.npy", np.arange(3))
    assert (
        "cannot be read as a NumPy array (Array can't be memory-mapped"
        in shardrun(capsys, "convert", tmp_path, "--out", tmp_path / "o")[2]
    )
    np.save(tmp_path / "val.npy", np.ones((2, 2)))
    assert "float64 of shape (2, 2), not a vector" in shardrun(capsys, "convert", tmp_path, "--out", tmp_path / "o")[2]
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "x.bin").touch()
    assert "holds .bin shards already" in shardrun(capsys, "convert", tmp_path, "--out", tmp_path / "o")[2]
    assert "There is no file or folder" in shardrun(capsys, "convert", tmp_path / "n", "--out", tmp_path / "p")[2]
