"""Folders of text as data: byte tokens, which documents are held out, and what the errors say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from speedrun.config import DataConfig
from speedrun.data import open_data
from speedrun.data.text import byte_tokens, hold_out


def test_byte_tokens() -> None:
    tokens = byte_tokens([b"hi", b"\xff"])
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [256, 104, 105, 256, 255]


def test_hold_out_takes_whole_documents_and_does_not_depend_on_their_order() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.bytes(int(length)) for length in rng.integers(1, 400, 300)]
    training, validation = hold_out(documents)
    assert sorted(training + validation) == sorted(documents)
    assert training == [document for document in documents if document in set(training)]
    total, held_out = sum(map(len, documents)), sum(map(len, validation))
    assert 0.06 * total <= held_out < 0.06 * total + 400

    order = rng.permutation(300)
    training_again, validation_again = hold_out([documents[i] for i in order])
    assert validation_again == validation
    assert sorted(training_again) == sorted(training)


def test_hold_out_leaves_no_copy_in_training() -> None:
    training, validation = hold_out([b"a", b"b", b"a", b"b"])
    assert len(training) == len(validation) == 1
    assert training != validation
    with pytest.raises(ValueError, match="is 1 document, and validation .*at least two files"):
        hold_out([b"a"])
    with pytest.raises(ValueError, match="1 document and 2 copies of it, which do not count, and .*at least two files"):
        hold_out([b"a", b"a", b"a"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * (10 + i))
    return tmp_path


def test_open_data_on_a_folder(folder: Path) -> None:
    config = DataConfig(source=str(folder), sequence_length=16, global_batch=4, eval_tokens=64)
    data = open_data(config, vocab_size=257, seed=3)
    size = sum(path.stat().st_size + 1 for path in folder.iterdir())
    assert data.train_tokens + data.val_tokens == size
    again = open_data(config, vocab_size=257, seed=3)
    assert again.content_hash == data.content_hash
    assert all(torch.equal(one, other) for one, other in zip(again.batch(7, 0, 4), data.batch(7, 0, 4), strict=True))
    assert open_data(config, 257, seed=4).global_batch_hash(0) != data.global_batch_hash(0)

    # Nothing of a held-out file is trained on: rebuild the files from the validation, and look for them.
    held_out = bytes_of(data.validation_parts[0].tokens)
    trained = bytes_of(data.stream.parts[0].tokens)
    assert held_out and not set(held_out) & set(trained)
    assert sorted(held_out + trained) == sorted(path.read_bytes() for path in folder.iterdir())

    (folder / "0.txt").write_text("something else")
    assert open_data(config, 257, seed=3).content_hash != data.content_hash


def bytes_of(tokens: np.ndarray) -> list[bytes]:
    pieces = np.split(tokens, np.flatnonzero(tokens == 256))[1:]
    return [piece[1:].astype(np.uint8).tobytes() for piece in pieces]


@pytest.mark.parametrize(
    ("change", "vocab_size", "seed", "message"),
    [
        ({"sequence_length": 0}, 257, 0, "data.sequence_length is 0"),
        ({"global_batch": -1}, 257, 0, "data.global_batch is -1"),
        ({"eval_tokens": 0}, 257, 0, "data.eval_tokens is 0"),
        ({"eval_sequence_length": -2}, 257, 0, "data.eval_sequence_length is -2"),
        ({}, 256, 0, "vocab_size must be at least 257, not 256"),
        ({}, 257, -5, "seed is -5"),
        ({"eval_tokens": 15}, 257, 0, "eval_tokens 15 is less than one validation row of 16"),
        ({"eval_tokens": 10**6}, 257, 0, "holds out [0-9]+ validation tokens.*needs 1000001"),
    ],
)
def test_wrong_configurations(folder: Path, change: dict[str, int], vocab_size: int, seed: int, message: str) -> None:
    values: dict[str, int] = {"sequence_length": 16, "global_batch": 4, "eval_tokens": 64, **change}
    with pytest.raises(ValueError, match=message) as error:
        open_data(DataConfig(source=str(folder), **values), vocab_size, seed)
    assert "\n" not in str(error.value)


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no text file"):
        open_data(DataConfig(source=str(tmp_path)), 257, 0)
    with pytest.raises(FileNotFoundError, match="does not exist: give a folder .* or 'pydocs'"):
        open_data(DataConfig(source=str(tmp_path / "nowhere")), 257, 0)
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match="is a file: give a folder"):
        open_data(DataConfig(source=str(tmp_path / "one.txt")), 257, 0)
