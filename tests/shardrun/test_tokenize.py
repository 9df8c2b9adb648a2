"""Text to shards: the parallel result against a plain loop, and against the text itself, which BPE over bytes keeps."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from shardrun.data.roundtrip import load_tokenizer, size_and_start
from shardrun.data.tokenize import _cut, tokenize
from speedrun.config import DataConfig
from speedrun.data import corpus, open_data, text
from speedrun.data.documents import read_folder
from speedrun.data.shards import open_shard

EOT = 0
"""The tokenizer's own <|endoftext|>: the trainer gives it the number 0."""


def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 600 tokens as GPT-2's is one of 50257, trained on the embedded corpus."""
    tokenizer = byte_bpe()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.decode() for document in corpus.pydocs()[0][:40]), trainer)
    tokenizer.enable_truncation(50)  # as many tokenizer files do; shards are of whole documents all the same
    tokenizer.enable_padding(length=80)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents from the corpus, and what may go wrong: copies, special tokens spelled out, an emoji."""
    folder = tmp_path_factory.mktemp("text")
    documents = [document[:20_000] for document in corpus.pydocs()[0][40:90]]
    documents += [documents[3], b"one<|endoftext|>two", "naïve 🙂 ümläut".encode(), b"x", b" \n"]
    for number, document in enumerate(documents):
        path = folder / f"{number % 7}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(document)
    return folder


def plain_loop(folder: Path, tokenizer_file: Path) -> tuple[list[int], list[int]]:
    """The training and the validation tokens, document by document."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    training, validation = text.hold_out(read_folder(folder)[0])

    def tokens(documents: list[bytes]) -> list[int]:
        return [token for document in documents for token in (EOT, *tokenizer.encode(document.decode()).ids)]

    return tokens(training), tokens(validation)


def test_parallel_is_the_plain_loop(
    folder: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardrun.data.tokenize.BATCH_BYTES", 3_000)  # many batches
    steps: list[tuple[int, int]] = []
    done = tokenize(folder, tmp_path, tokenizer_file, 2, 30_000, lambda *step: steps.append(step))
    training, validation = plain_loop(folder, tokenizer_file)

    def shards(kind: str) -> list[np.ndarray]:
        return [open_shard(path) for path in sorted(tmp_path.glob(f"text_{kind}_*.bin"))]

    assert np.concatenate(shards("train")).tolist() == training
    assert np.concatenate(shards("val")).tolist() == validation
    assert len(shards("train")) == -(-len(training) // 30_000) > 1
    assert all(len(shard) == 30_000 for shard in shards("train")[:-1])
    assert [path.name for path in done.shards][:2] == ["text_val_000000.bin", "text_train_000001.bin"]
    assert (done.documents, done.tokens) == ((training + validation).count(EOT), len(training + validation))
    assert len(steps) > 10 and steps == sorted(steps) and steps[-1] == (done.text_bytes, done.text_bytes)
    assert not list(tmp_path.glob("*.part"))
    assert (done.vocabulary.size, done.vocabulary.document_start, done.report.copies) == (600, EOT, 1)
    sidecar = json.loads((tmp_path / "tokens.json").read_text())
    assert sidecar["tokenizer"]["sha256"] == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    assert (sidecar["schema"], sidecar["vocab_size"], sidecar["document_start"], sidecar["dtype"]) == (
        *(1, 600, EOT),
        "uint16",
    )

    # The text comes back out of the tokens, "<|endoftext|>" as a text among the others.
    decoder = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    documents = "".join(map(chr, training)).split(chr(EOT))[1:]
    decoded = [decoder.decode([ord(token) for token in document], skip_special_tokens=False) for document in documents]
    assert decoded == [document.decode() for document in text.hold_out(read_folder(folder)[0])[0]]
    assert any("one<|endoftext|>two" == document for document in decoded + [decoder.decode(validation)])

    # And the trainer reads them.
    config = DataConfig(source=str(tmp_path), sequence_length=32, global_batch=4, eval_tokens=64)
    data = open_data(config, vocab_size=600, seed=0)
    assert data.train_tokens >= len(training) and data.batch(0, 0, 4)[0].shape == (4, 32)

    with pytest.raises(ValueError, match="holds .bin shards already: name another folder with --out"):
        tokenize(folder, tmp_path, tokenizer_file, 2, 30_000, lambda *step: None)


@pytest.mark.parametrize("length", [1, 7, 10, 100])
def test_cut(length: int) -> None:
    rng = np.random.default_rng(length)
    pieces = [rng.integers(0, 9, size).astype(np.uint16) for size in (3, 0, 25, 1, 10, 10)]
    everything = np.concatenate(pieces)
    shards = list(_cut(pieces, length))
    assert [shard.tolist() for shard in shards] == [
        everything[start : start + length].tolist() for start in range(0, len(everything), length)
    ]


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in ("{}", "no JSON"):
        path.write_text(content)
        with pytest.raises(ValueError, match="is no tokenizer file in the form of tokenizer.json"):
            load_tokenizer(path)
    with pytest.raises(ValueError, match="other.json is no tokenizer file .*No such file"):
        load_tokenizer(tmp_path / "other.json")


def with_tokens(path: Path, tokens: dict[str, int], special: tuple[str, ...] = ()) -> tuple[int, int]:
    """The size and document start of a byte-level BPE with these tokens."""
    byte_bpe().save(str(path))
    definition = json.loads(path.read_text())
    definition["model"]["vocab"] = tokens
    more = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition["added_tokens"] = [{"id": tokens[name], "content": name, **more} for name in special]
    path.write_text(json.dumps(definition))
    return size_and_start(load_tokenizer(path))


def test_every_size_of_vocabulary_has_its_document_start(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    many = {f"t{number}": number for number in range(50256)}
    # GPT-2's shape: 50256 tokens of text and <|endoftext|> behind them, which is special.
    assert with_tokens(path, {**many, "<|endoftext|>": 50256}, ("<|endoftext|>",)) == (50257, 50256)
    assert with_tokens(path, {**many, "<|endoftext|>": 60000}, ("<|endoftext|>",)) == (60001, 60000)
    assert with_tokens(path, {**many, "</s>": 50257, "<s>": 50258}, ("</s>", "<s>")) == (50259, 50258)
    # Not special: text may spell it. So one more token begins a document.
    assert with_tokens(path, {"a": 0, "<|endoftext|>": 1}) == (3, 2)
    assert with_tokens(path, {"a": 0, "b": 7}) == (9, 8)
    # What the tokenizer itself puts before a text comes first.
    tokenizer = byte_bpe()
    tokenizer.add_special_tokens(["<|endoftext|>", "<start>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A", pair="$A $B", special_tokens=[("<start>", tokenizer.token_to_id("<start>"))]
    )
    tokenizer.save(str(path))
    assert size_and_start(load_tokenizer(path)) == (2, 1)


def test_nothing_to_tokenize(tokenizer_file: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for content, message in (
        ("", "holds no text file"),
        ("one", "1 document, and validation holds out whole documents"),
    ):
        (tmp_path / "in" / "a.txt").write_text(content)
        with pytest.raises(ValueError, match=message):
            tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file, 1, 10, lambda *step: None)
    with pytest.raises(ValueError, match="0 processes"):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizer_file, 0, 10, lambda *step: None)
    assert not (tmp_path / "out").exists()
