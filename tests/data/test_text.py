"""Folders of text as data: byte tokens, which documents are held out, and what the errors say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from speedrun.config import DataConfig
from speedrun.data import open_data
from speedrun.data.text import HELD_OUT, byte_tokens, choose_held_out, chosen_as_before, hold_out, split_end


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


@pytest.mark.parametrize(
    "sizes",
    [
        [20_000] * 5 + [4_000_001],
        [1_000] * 99 + [100_000],
        [5_000] * 50 + [20_000] * 3,
        [1] * 200 + [10**9],
        [3, 10**6],
        [2**i for i in range(24)],
        [10**5 - i for i in range(9)],
    ],
)
def test_never_more_than_twice_the_share_is_held_out(sizes: list[int]) -> None:
    """Whatever the sizes, in whatever order the hashes stand: 1,000 orders of each."""
    rng = np.random.default_rng(len(sizes))
    total = sum(sizes)
    for _ in range(1000):
        held_out = choose_held_out({rng.bytes(32): size for size in sizes})
        assert 0 < sum(held_out.values()) <= 2 * HELD_OUT * total
        if any(size <= 2 * HELD_OUT * total for size in sizes):  # then whole documents
            assert all(size in sizes for size in held_out.values())


def test_never_more_than_twice_the_share_of_any_sizes() -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        count = int(rng.integers(2, 40))
        sizes = (rng.lognormal(8, rng.uniform(0, 4), count) + 20).astype(int).tolist()
        held_out = choose_held_out({rng.bytes(32): size for size in sizes})
        assert 0 < sum(held_out.values()) <= 2 * HELD_OUT * sum(sizes)


def test_a_document_is_cut_where_all_are_large() -> None:
    words = ["Vögel 🐦", "singen.\n\nMorgens", "früh", "漢字\n"]
    rng = np.random.default_rng(2)
    for separator in (" ", "\n", "\n\n", ""):
        documents = [separator.join(rng.choice(words, 300)).encode() for _ in range(3)]
        training, validation = hold_out(documents)
        total = sum(map(len, documents))
        assert len(training) == 3 and len(validation) == 1 and 0.05 * total < len(validation[0]) <= 0.12 * total
        (whole,) = (document for document in documents if document not in training)
        (begin,) = (piece for piece in training if piece not in documents)
        assert begin + validation[0] == whole and begin.decode() + validation[0].decode() == whole.decode()
        assert begin.endswith((b"\n", separator.encode()))
    assert split_end("ab🐦🐦".encode(), 1) == ("ab🐦".encode(), "🐦".encode())
    assert split_end(b"x", 1) == (b"", b"x") and split_end(b"x", 0) == (b"x", b"")


def test_what_was_held_out_before_still_is() -> None:
    """A run of an earlier version may go on only where it trains on the same documents."""
    rng = np.random.default_rng(3)
    assert chosen_as_before([rng.bytes(int(size)) for size in rng.integers(100, 2_000, 100)])
    assert not chosen_as_before([rng.bytes(5_000) for _ in range(5)])


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
    ("change", "vocab_size", "message"),
    [
        ({"sequence_length": 0}, 257, "data.sequence_length is 0"),
        ({"global_batch": -1}, 257, "data.global_batch is -1"),
        ({"eval_tokens": 0}, 257, "data.eval_tokens is 0"),
        ({"eval_sequence_length": -2}, 257, "data.eval_sequence_length is -2"),
        ({}, 256, "vocab_size must be at least 257, not 256"),
        ({"eval_tokens": 15}, 257, "eval_tokens 15 is less than one validation row of 16"),
        ({"eval_tokens": 10**6}, 257, "holds out [0-9]+ validation tokens.*needs 1000001"),
    ],
)
def test_wrong_configurations(folder: Path, change: dict[str, int], vocab_size: int, message: str) -> None:
    values: dict[str, int] = {"sequence_length": 16, "global_batch": 4, "eval_tokens": 64, **change}
    with pytest.raises(ValueError, match=message) as error:
        open_data(DataConfig(source=str(folder), **values), vocab_size, 0)
    assert "\n" not in str(error.value)


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no text file"):
        open_data(DataConfig(source=str(tmp_path)), 257, 0)
    with pytest.raises(FileNotFoundError, match="does not exist: give a folder .* or 'pydocs'"):
        open_data(DataConfig(source=str(tmp_path / "nowhere")), 257, 0)
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match="is a file: give a folder"):
        open_data(DataConfig(source=str(tmp_path / "one.txt")), 257, 0)
