"""A tokenizer of more than 128,000 tokens from text to training: shards of 4 bytes a token, ZeRO-2 on two ranks."""

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shardrun.data.tokenize import tokenize
from speedrun.data import corpus, open_data
from speedrun.data.shards import open_shard
from speedrun.run.command_line import parse
from tests.ranks import RankPool
from tests.speedrun.runs import metrics, train_here


def large_tokenizer(text: str) -> Tokenizer:
    """Bytes, all pairs of them, and all threes of the 41 that are most frequent in a text: merged in this order.

    The threes have numbers from 65,792 on, which do not fit in two bytes, and so has the token that begins a document.
    """
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    counts = Counter(character for piece, _ in pieces for character in piece)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda character: (-counts[character], character))
    merges = list(itertools.product(alphabet, alphabet))
    merges += [(first + second, third) for first, second, third in itertools.product(alphabet[:41], repeat=3)]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin_of_text|>"])
    return tokenizer


@pytest.mark.ranks
@pytest.mark.slow
def test_it_trains_under_zero2_as_in_one_process(ranks: RankPool, tmp_path: Path) -> None:
    documents = [document[:600] for document in corpus.pydocs()[0][:12]]
    tokenizer = large_tokenizer(b"".join(documents).decode())
    tokenizer.save(str(tmp_path / "large.json"))
    size = 256 + 256**2 + 41**3 + 1
    (tmp_path / "text").mkdir()
    for number, document in enumerate(documents):
        (tmp_path / "text" / f"{number}.txt").write_bytes(document)
    done = tokenize(tmp_path / "text", tmp_path / "shards", tmp_path / "large.json", 1, 10_000, lambda *step: None)
    assert (done.vocabulary.size, done.vocabulary.document_start) == (size, size - 1) and size > 128_000
    tokens = np.concatenate([open_shard(path) for path in done.shards])
    assert tokens.dtype == np.uint32 and (tokens > 65_535).mean() > 0.05
    assert (tokens == size - 1).sum() == len(documents)
    pieces = [piece[1:].tolist() for piece in np.split(tokens, np.flatnonzero(tokens == size - 1))[1:]]
    assert sorted(tokenizer.decode(piece).encode() for piece in pieces) == sorted(documents)

    options = ["tiny", "--data.source", str(tmp_path / "shards"), "--progress", "none", "--name", "run", "--steps", "3"]
    options += ["--model.layers", "1", "--model.width", "16", "--model.heads", "1", "--model.bigram-rows", "101"]
    options += ["--model.trigram-rows", "0", "--model.fourgram-rows", "0", "--model.ngram-width", "0"]
    options += ["--data.sequence-length", "16", "--data.global-batch", "4", "--data.eval-tokens", "64"]
    options += ["--untimed-steps", "0", "--eval-every", "0"]
    config = parse([*options, "--out", str(tmp_path / "zero2")])[1]
    assert config.model.vocab_size == size
    inputs, _ = open_data(config.data, size, config.seed).batch(0, 0, 4)
    assert inputs.max() == size - 1 and (inputs[:, 1:] > 65_535).any()  # no number was cut to two bytes

    ranks.run(2, train_here, "zero2", config)
    ranks.run(1, train_here, "single", parse([*options, "--out", str(tmp_path / "single")])[1])
    spread, alone = (metrics(tmp_path / name / "run") for name in ("zero2", "single"))
    losses = [line["train_loss"] for line in spread if "train_loss" in line]
    assert losses == pytest.approx([line["train_loss"] for line in alone if "train_loss" in line], rel=1e-5)
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(size), rel=0.02) and losses[2] < losses[0]
