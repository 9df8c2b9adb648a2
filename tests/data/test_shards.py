"""Shards: what is written is read, and every kind of damage is refused with the file's name and the numbers."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from speedrun.config import DataConfig
from speedrun.data import Data, open_data
from speedrun.data.shards import DataChangedError, open_shard, write_tokens

EOT = 50256


def header(magic: int = 20240520, version: int = 1, count: int = 6) -> bytes:
    return struct.pack("<3i", magic, version, count) + bytes(1024 - 12)


BODY = struct.pack("<6H", EOT, 1, 2, EOT, 50000, 4)


def test_reads_the_format(tmp_path: Path) -> None:
    path = tmp_path / "x_train_0.bin"
    path.write_bytes(header() + BODY)
    tokens = open_shard(path)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
    assert tokens.tolist() == [EOT, 1, 2, EOT, 50000, 4]


def test_writes_the_format(tmp_path: Path) -> None:
    path = tmp_path / "x_train_0.bin"
    write_tokens(path, np.array([EOT, 1, 2, EOT, 50000, 4], dtype=np.int64))
    assert path.read_bytes() == header() + BODY


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, less than its header of 1024"),
        (header()[:500], "has 500 bytes, less than its header of 1024"),
        (header(magic=20240802) + BODY, "begins with 20240802, not .* number 20240520.*`shardrun data convert /"),
        (header(magic=20240801) + BODY, "has version 1, only 7 can be read"),
        (header(version=2) + BODY, "has version 2, only 1 can be read"),
        (header(count=0), "says that it holds 0 tokens"),
        (header(count=-6) + BODY, "says that it holds -6 tokens"),
        (header() + BODY[:-1], "has 11 bytes of tokens, an odd number"),
        (header() + BODY[:-2], r"holds 5 tokens but its header promises 6 \(the file has 1034 bytes, not 1036\).*cut"),
        (header(count=5) + BODY, "holds 6 tokens but its header promises 5 .* behind its tokens"),
    ],
)
def test_damage_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x_train_0.bin"
    path.write_bytes(content)
    write_tokens(tmp_path / "x_val_0.bin", np.arange(100))
    config = DataConfig(source=str(tmp_path), sequence_length=4, global_batch=2, eval_tokens=8)
    with pytest.raises(ValueError, match=message) as error:
        open_data(config, vocab_size=50257, seed=0)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "at least one"), ([-1], "not -1"), ([65536], "not 65536"), ([[1]], "shape"), ([0.5], "float64")],
)
def test_unwritable_tokens(tmp_path: Path, tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_tokens(tmp_path / "x.bin", np.array(tokens, dtype=None if tokens else np.int64))


def open_folder(folder: Path, vocab_size: int = 50257, **values: int) -> Data:
    values = {"sequence_length": 4, "global_batch": 2, "eval_tokens": 8, **values}
    return open_data(DataConfig(source=str(folder), **values), vocab_size, seed=0)


def test_shards_are_found_by_name(tmp_path: Path) -> None:
    write_tokens(tmp_path / "f_train_000002.bin", np.array([EOT, 21, 22]))
    with pytest.raises(ValueError, match=r"1 shards named \*_train_\*.bin and 0 named \*_val_\*.bin"):
        open_folder(tmp_path)
    write_tokens(tmp_path / "f_train_000001.bin", np.array([11, 12, EOT, 13]))  # begins in mid-document
    write_tokens(tmp_path / "f_val_000000.bin", np.arange(9))
    write_tokens(tmp_path / "f_val_000001.bin", np.arange(9, 20))
    data = open_folder(tmp_path)
    assert [part.tokens.tolist()[0] for part in data.stream.parts] == [11, EOT]
    assert (data.train_tokens, data.val_tokens, data.document_start) == (4 + 1 + 3, 20, EOT)
    assert data.target_bytes() is None
    # Validation goes over the edge of a shard.
    inputs, targets = open_folder(tmp_path, eval_tokens=19).validation(1, 4)
    assert inputs.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert targets.tolist() == [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]


def test_the_hash_sees_names_sizes_and_headers(tmp_path: Path) -> None:
    write_tokens(tmp_path / "f_train_0.bin", np.arange(10))
    write_tokens(tmp_path / "f_val_0.bin", np.arange(10))
    hashes = [open_folder(tmp_path).content_hash]
    assert open_folder(tmp_path).content_hash == hashes[0]
    write_tokens(tmp_path / "f_train_0.bin", np.arange(11))
    hashes.append(open_folder(tmp_path).content_hash)
    (tmp_path / "f_train_0.bin").rename(tmp_path / "f_train_1.bin")
    hashes.append(open_folder(tmp_path).content_hash)
    assert len(set(hashes)) == 3


def test_tokens_outside_the_vocabulary(tmp_path: Path) -> None:
    write_tokens(tmp_path / "f_train_0.bin", np.array([EOT, 1, 2, 3]))
    write_tokens(tmp_path / "f_train_1.bin", np.array([EOT, 1, 2, 50300]))
    write_tokens(tmp_path / "f_val_0.bin", np.array([EOT, *range(20), 50257]))
    data = open_folder(tmp_path)
    with pytest.raises(ValueError, match="f_train_1.bin holds token 50300 at position 3, outside .* 50257"):
        for step in range(4):
            data.batch(step, 0, 2)
    with pytest.raises(ValueError, match="f_val_0.bin holds token 50257 at position 21"):
        open_folder(tmp_path, eval_tokens=21, sequence_length=3).validation(0, 7)
    with pytest.raises(ValueError, match="vocab_size must be at least 50257, not 50000"):
        open_folder(tmp_path, vocab_size=50000)
    open_folder(tmp_path, vocab_size=50304).batch(0, 0, 2)


def long_shards(folder: Path, tokens: int = 400_000) -> Path:
    """A folder with a training shard of many pages; returns that."""
    write_tokens(folder / "f_train_0.bin", np.arange(tokens) % 1000)
    write_tokens(folder / "f_val_0.bin", np.arange(100))
    return folder / "f_train_0.bin"


@pytest.mark.parametrize("tokens", [100, 400_000])
def test_the_hash_sees_the_tokens(tmp_path: Path, tokens: int) -> None:
    """Of the same file name, length and header; in a long shard at 64 places at least."""
    path = long_shards(tmp_path, tokens)
    before = open_folder(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:1024] + b"\7\0" * tokens)
    all_other = open_folder(tmp_path)
    assert all_other.content_hash != before.content_hash and all_other.older_hash == before.older_hash
    parts = np.array_split(np.arange(1024, len(content)), 50 if tokens > 1000 else 1)
    for part in parts:  # a fiftieth of it is other text
        path.write_bytes(content[: part[0]] + b"\7" * len(part) + content[part[-1] + 1 :])
        assert open_folder(tmp_path).content_hash != before.content_hash
    path.write_bytes(content)
    assert open_folder(tmp_path).content_hash == before.content_hash


def replaced(path: Path, content: bytes) -> None:
    """By another file, as a download or rsync does it."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: os.truncate(path, 100_000),
            "has become shorter since the run began .801024 bytes then, 100000 n",
        ),
        (lambda path: os.truncate(path, 0), "has become shorter since the run began"),
        (lambda path: replaced(path, path.read_bytes()[:-2]), "has become shorter"),
        (lambda path: replaced(path, path.read_bytes() + b"\0\0"), "has become longer"),
        (lambda path: path.write_bytes(path.read_bytes()[:1024] + b"\7" * 800_000), "holds other tokens than when"),
        (lambda path: replaced(path, path.read_bytes()[:1024] + b"\7" * 800_000), "holds other tokens than when"),
        (lambda path: path.unlink(), "is not there any more .No such file"),
        (lambda path: os.utime(path, (1, 1)), ""),
        (lambda path: replaced(path, path.read_bytes()), ""),
    ],
)
def test_a_shard_that_changes_while_it_is_read(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    """Said before its memory map is touched, again and again, for training and validation."""
    path = long_shards(tmp_path)
    data = open_folder(tmp_path)
    batch = data.batch(3, 0, 2)
    change(path)
    for read in (lambda: data.batch(3, 0, 2), lambda: data.validation(0, 1), lambda: data.batch(4, 0, 1)):
        if message:
            with pytest.raises(DataChangedError, match=f"Shard {path} {message}.*go on with --resume auto"):
                read()
        else:
            read()
    if not message:
        assert all(torch.equal(now, then) for now, then in zip(data.batch(3, 0, 2), batch, strict=True))


@pytest.mark.parametrize("change", (lambda path: os.truncate(path, 1030), os.unlink), ids=("cut", "gone"))
def test_a_shard_that_changes_between_the_look_and_the_reading_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    """In a thread that reads ahead. To touch a map of what was cut off would end the process."""
    for kind in ("train", "val"):
        write_tokens(tmp_path / f"x_{kind}_0.bin", np.array([EOT, *range(400)]))
    data = open_data(DataConfig(source=str(tmp_path), sequence_length=16, global_batch=4, eval_tokens=16), 50_304, 0)
    before = data.batch(0, 0, 4)
    change(tmp_path / "x_train_0.bin")
    monkeypatch.setattr("speedrun.data.shards.Watched.check", lambda self: None)
    with pytest.raises(DataChangedError, match=r"x_train_0.bin (has become shorter|is not there)"):
        data.batch(1, 0, 4)
    assert before[0].shape == (4, 16)
