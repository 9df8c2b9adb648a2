"""A tokenizer that loses text is refused by name, with the share; one that keeps it is not, whatever else it does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from shardrun.data.roundtrip import Encoder
from shardrun.data.tokenize import Tokenized, tokenize
from speedrun.data.shards import open_shard

TEXT = "Café 🦊 naïve 漢字 the quick brown fox."
FOX = ["the quick brown fox"] * 20


def trained(model: Any = None, bytes_too: bool = False, normalizer: Any = None, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(model or models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    if bytes_too:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.pop("prefix", False))
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(FOX, trainers.BpeTrainer(vocab_size=300, show_progress=False, **options))
    return tokenizer


def write(tmp_path: Path, tokenizer: Tokenizer, **options: Any) -> Tokenized:
    """Three documents, and of one the end is held out: four to the tokenizer."""
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"{TEXT} {number}", encoding="utf-8")
    tokenizer.save(str(tmp_path / "t.json"))
    return tokenize(folder, tmp_path / "out", tmp_path / "t.json", 1, 1000, lambda *step: None, **options)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        # Without an unknown token: what it does not know is gone: C, é, 🦊, ï, v, 漢, 字, the dot.
        (
            trained(),
            r"[0-9]+ of [0-9]+ bytes do not come back \([3-6][0-9]\..%\); in 0.txt, 'Café .*' comes back as 'f n",
        ),
        (
            trained(models.BPE(unk_token="[UNK]"), special_tokens=["[UNK]"]),
            r"[0-9]+ of [0-9]+ tokens are unknown \([0-9.]+%\), .*'Café .* comes back as '\[UNK\] \[UNK\] f",
        ),
        (Tokenizer(models.BPE()), r"bytes do not come back \(100.0%\)"),
        (Tokenizer(models.WordLevel({"the": 0}, unk_token="[UNK]")), r"cannot encode 0.txt \(WordLevel error: Missing"),
        (trained(bytes_too=True, normalizer=normalizers.Lowercase()), r"comes back as 'café.*its normalizer rewrites"),
        (
            trained(bytes_too=True, normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
            "its normalizer rewrites text",
        ),
    ],
)
def test_losses_are_refused(tmp_path: Path, tokenizer: Tokenizer, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        write(tmp_path, tokenizer)
    assert str(error.value).startswith(f"The tokenizer {tmp_path / 't.json'} cannot be used: it ")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_loss_that_was_allowed_is_written_down(tmp_path: Path) -> None:
    tokenizer = trained(models.BPE(unk_token="[UNK]"), special_tokens=["[UNK]"])
    done = write(tmp_path, tokenizer, lossy=True)
    unknown = tokenizer.token_to_id("[UNK]")
    tokens = np.concatenate([open_shard(path) for path in done.shards])
    assert done.loss.unknown == int((tokens == unknown).sum()) > 0 and done.loss.tokens == len(tokens) - 4
    known = set("the quick brown fox ")
    lost = sum(len(c.encode()) for number in range(3) for c in f"{TEXT} {number}" if c not in known)
    assert lost <= done.loss.lost_bytes <= done.loss.text_bytes  # and every space more that is not put back
    sidecar = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert sidecar["round_trip"] == {"unknown_tokens": done.loss.unknown, "lost_bytes": done.loss.lost_bytes}


@pytest.mark.parametrize(
    ("tokenizer", "other_form"),
    [
        (trained(bytes_too=True), 0),
        (trained(bytes_too=True, prefix=True), 4),  # a space before each document
        (trained(bytes_too=True, normalizer=normalizers.NFD()), 3),  # the same letters, in more characters
    ],
)
def test_what_keeps_the_text_is_taken(tmp_path: Path, tokenizer: Tokenizer, other_form: int) -> None:
    done = write(tmp_path, tokenizer)
    assert not done.loss and done.loss.other_form == other_form and done.documents == 3


def test_a_loss_in_a_late_document_is_found_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardrun.data.tokenize.BATCH_BYTES", 10)
    (tmp_path / "in").mkdir()
    for number in range(20):
        (tmp_path / "in" / f"{number:02}.txt").write_text(f"{'the' * (number + 1)}{'~' * (number == 15)}")
    tokenizer = Tokenizer(models.BPE({"t": 0, "h": 1, "e": 2}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match="1 of [0-9]+ bytes .*in 15.txt, 'hethethe~' comes back as"):
        tokenize(tmp_path / "in", tmp_path / "out", tmp_path / "t.json", 2, 7, lambda *step: None)
    assert not (tmp_path / "out").exists()


def test_text_never_begins_a_document(tmp_path: Path) -> None:
    """A model that knows the word for the document start itself: the text would be cut in two there."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<s>": 2}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>"])
    encoder = Encoder(tokenizer.to_str())
    assert encoder.start == 2
    tokens, _ = encoder.encode([("x", b"a b"), ("y", b"b")])
    assert tokens.tolist() == [2, 0, 1, 2, 1]
    with pytest.raises(ValueError, match="gives text of y the token 2, which begins a document"):
        encoder.encode([("x", b"a"), ("y", b"a <s> b")])


@pytest.mark.parametrize("number", range(3))  # one of them is held out
def test_a_folder_that_changes_is_not_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from speedrun.data import text

    held_out = text.choose_held_out

    def change(*arguments: Any) -> dict[bytes, None]:
        (tmp_path / "in" / f"{number}.txt").write_text("other")
        return held_out(*arguments)

    monkeypatch.setattr(text, "choose_held_out", change)
    with pytest.raises(ValueError, match="The text changed while it was read"):
        write(tmp_path, trained(bytes_too=True))
    assert not (tmp_path / "out").exists()
