"""The sidecar of shards, and shards of 4 bytes a token: what is written is read, and what does not fit is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speedrun.config import DataConfig
from speedrun.data import Data, open_data
from speedrun.data.shards import find_shards, open_shard, shards_vocabulary, split_of, write_tokens
from speedrun.data.vocabulary import GPT2, LLAMA3, Vocabulary, read_sidecar, write_sidecar
from speedrun.run.command_line import parse

SMALL = Vocabulary(300, 7, "abc")
LARGE = Vocabulary(131_329, 131_328)


def folder_of(folder: Path, vocabulary: Vocabulary, tokens: Any, sidecar: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("x_train_1.bin", "x_val_0.bin"):
        write_tokens(folder / name, np.asarray(tokens), vocabulary)
    if sidecar:
        write_sidecar(folder, vocabulary)
    return folder


def opened(folder: Path, vocab_size: int) -> Data:
    return open_data(DataConfig(source=str(folder), sequence_length=2, global_batch=1, eval_tokens=4), vocab_size, 0)


def test_a_sidecar_says_what_was_written(tmp_path: Path) -> None:
    assert read_sidecar(tmp_path) is None
    for vocabulary in (GPT2, SMALL, LARGE):
        write_sidecar(tmp_path, vocabulary, documents=3)
        assert read_sidecar(tmp_path) == vocabulary
    assert (GPT2.dtype, Vocabulary(65_536, 0).dtype, Vocabulary(65_537, 0).dtype) == ("uint16", "uint16", "uint32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no JSON", "cannot be read .*write the shards again"),
        ("[1]", "says nothing of a schema"),
        ({"schema": "1"}, "says nothing of a schema"),
        ({"schema": 2}, "has schema 2, newer than 1: update"),
        ({"vocab_size": "300"}, "vocab_size '300' and document_start 7"),
        ({"vocab_size": None}, "vocab_size None"),
        ({"document_start": 300}, "document_start 300, but a document start is a token from 0 to"),
        ({"document_start": True}, "document_start True"),
        ({"dtype": "uint32"}, "gives dtype 'uint32', but 300 tokens take uint16"),
        ({"tokenizer": {"sha256": 1}}, "write the shards again"),
    ],
)
def test_broken_sidecars(tmp_path: Path, change: str | dict[str, Any], message: str) -> None:
    folder = folder_of(tmp_path, SMALL, [7, 1, 2, 3, 4, 5])
    path = folder / "tokens.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    for read in (lambda: opened(folder, 300), lambda: parse(["tiny", "--data.source", str(folder)])):
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE, LLAMA3])
def test_tokens_come_back_as_they_were(tmp_path: Path, vocabulary: Vocabulary) -> None:
    start, top = vocabulary.document_start, vocabulary.size - 1
    tokens = [start, 1, top, 2, start, 3, 4, top - 1 if top - 1 != start else 0]
    folder = folder_of(tmp_path, vocabulary, tokens)
    shard = open_shard(folder / "x_train_1.bin")
    assert shard.tolist() == tokens and shard.dtype == np.dtype(vocabulary.dtype)
    data = opened(folder, vocabulary.size)
    assert (data.document_start, data.train_tokens) == (start, 8)
    seen = [data.batch(step, 0, 1) for step in range(4)]  # an epoch, every token a target once
    assert sorted(token for _, targets in seen for token in targets.flatten().tolist()) == sorted(tokens)
    inputs, targets = data.validation(0, 2)
    assert (inputs.flatten().tolist(), targets.flatten().tolist()) == (tokens[:4], tokens[1:5])


def test_uint32_shards_have_the_header_of_llm_c(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", np.array([128_000, 5, 128_255]), LLAMA3)
    assert (tmp_path / "a.bin").read_bytes() == (
        struct.pack("<3i", 20240801, 7, 3) + bytes(1012) + struct.pack("<3I", 128_000, 5, 128_255)
    )
    folder_of(tmp_path / "folder", LLAMA3, [128_000, 5, 128_255] * 3, sidecar=False)
    assert opened(tmp_path / "folder", 128_256).document_start == 128_000  # nobody needs to write a sidecar for it
    with pytest.raises(ValueError, match="holds tokens from 0 to 4294967295, not 4294967296"):
        write_tokens(tmp_path / "a.bin", np.array([1 << 32]), LLAMA3)


def test_shards_without_their_sidecar_are_not_taken_for_gpt2s(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", SMALL, [7, 1, 2, 3, 4, 5], sidecar=False)
    with pytest.raises(ValueError, match="x_train_1.bin .* vocabulary of 300, but there is no tokens.json beside it"):
        opened(folder, 50257)
    same_size = folder_of(tmp_path / "b", Vocabulary(50257, 0), [0, 1, 2, 3, 4, 5], sidecar=False)
    with pytest.raises(ValueError, match="no tokens.json beside it"):
        opened(same_size, 50257)
    write_sidecar(folder, Vocabulary(400, 7))
    with pytest.raises(ValueError, match="of a vocabulary of 300 .uint16., but tokens.json is of 400"):
        opened(folder, 50257)
    write_sidecar(folder, SMALL)
    write_tokens(folder / "y_train_1.bin", np.array([50256, 1]))
    with pytest.raises(ValueError, match="y_train_1.bin holds tokens of a vocabulary of 50257 .*folders of their own"):
        opened(folder, 50257)
    mixed = folder_of(tmp_path / "c", GPT2, [50256, 1, 2, 3, 4], sidecar=False)
    write_tokens(mixed / "y_train_1.bin", np.array([128_000, 1]), LLAMA3)
    with pytest.raises(ValueError, match="y_train_1.bin .* 128256 .uint32., but x_train_1.bin is of 50257 .uint16"):
        shards_vocabulary(mixed, find_shards(mixed)[0])


def test_the_model_gets_the_vocabulary_of_the_data(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, SMALL, [7, 1, 2, 3, 4, 5])
    source = ["--data.source", str(folder)]
    assert parse(["tiny", *source])[1].model.vocab_size == 300
    assert parse(["gpt2", *source, "--model.vocab-size", "0"])[1].model.vocab_size == 300
    said = parse(["tiny", *source, "--model.vocab-size", "257"])[1]
    assert said.model.vocab_size == 257
    with pytest.raises(ValueError, match="vocabulary of 300 tokens, .* must be at least 300, not 257"):
        opened(folder, said.model.vocab_size)
    assert parse(["gpt2"])[1].model.vocab_size == 50257 and parse(["tiny"])[1].model.vocab_size == 257
    assert parse(["gpt2", "--data.source", "pydocs"])[1].model.vocab_size == 50257  # as the preset, without a sidecar


def test_whose_tokens_count_in_the_hash(tmp_path: Path) -> None:
    first = opened(folder_of(tmp_path / "a", SMALL, [7, 1, 2, 3, 4, 5]), 300).content_hash
    assert opened(folder_of(tmp_path / "b", Vocabulary(300, 6, "abc"), [7, 1, 2, 3, 4, 5]), 300).content_hash != first
    assert opened(folder_of(tmp_path / "c", Vocabulary(300, 7, "abd"), [7, 1, 2, 3, 4, 5]), 300).content_hash != first


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("fineweb_train_000001", "train"), ("edufineweb_val_000000", "val"), ("train", "train"), ("val", "val")),
        *(("tiny-shakespeare-val", "val"), ("TinyStories_train", "train"), ("x.validation.1", "val")),
        *(("trainer_1", ""), ("evaluation", ""), ("train_val", ""), ("tokens", "")),
    ],
)
def test_the_name_says_what_a_shard_is_for(name: str, split: str) -> None:
    assert split_of(Path(f"folder/{name}.bin")) == split


def test_a_shard_that_is_for_neither_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, SMALL, [7, 1, 2, 3, 4, 5])
    assert opened(folder, 300).note == ""
    write_tokens(folder / "test.bin", np.arange(3), SMALL)
    assert opened(folder, 300).note == "shards: 2 read; test.bin left out: the name says neither train nor val"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "a Git LFS pointer.*`git lfs pull`"),
        (b"\x93NUMPY" + bytes(2000), "no shard but a NumPy array; if it holds tokens, `shardrun data convert`"),
        (b"\n<!DOCTYPE html>" + bytes(2000), "is a web page"),
        (
            bytes(2000),
            "begins with 0, .*tokens without a header, as nanoGPT .*`shardrun data convert .* --out .*-shards`",
        ),
        (struct.pack("<4i", 20240520, 1, 1, -1) + bytes(1008) + bytes(2), "its vocabulary has -1 tokens"),
    ],
)
def test_what_is_no_shard_is_recognised(tmp_path: Path, content: bytes, message: str) -> None:
    folder_of(tmp_path, GPT2, [50256, 1, 2, 3, 4, 5], sidecar=False)
    (tmp_path / "x_train_1.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, 50257)
