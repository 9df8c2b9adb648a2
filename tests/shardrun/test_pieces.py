"""A large document in pieces: the tokens are those of the whole, for every kind of tokenizer and of text."""

import os
import random
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from shardrun.data.pieces import pieces
from shardrun.data.roundtrip import tokenizer_of
from speedrun.data import corpus

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEEDS = int(os.environ.get("SHARDRUN_TEST_SEEDS", "3"))
"""Texts for each tokenizer; 200 were tried once."""

WORDS = [
    *(
        "the",
        "learning",
        "Straße",
        "naïve",
        "na\u0131\u0308ve",
        "don't",
        "I'LL",
        "漢字",
        "日本語のテキスト",
        "한국어",
        "🙂",
        "👩‍👩‍👧",
        "x" * 30,
    ),
    *("3.14159", "1234567", "…", "//", "==", "<|endoftext|>", ">>>", "__init__", "a_b", "\u0301", "\u200b", "\ufeff"),
]
BETWEEN = [" ", " ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "", ".", ", ", "\u3000", "\xa0", " " * 50]


def text_of(seed: int, length: int) -> str:
    """Words and what stands between them, in stretches of one kind each."""
    rng = random.Random(seed)
    parts, size = [], 0
    while size < length:
        words, between = rng.sample(WORDS, 4), rng.sample(BETWEEN, 3)
        for _ in range(rng.randint(1, 60)):
            parts.append(rng.choice(words) + rng.choice(between))
            size += len(parts[-1])
        if rng.random() < 0.1:
            parts.append(rng.choice("a7. \n漢") * rng.randint(1, 3 * length // 10))
    return "".join(parts)


def trained(
    model: Any, trainer: Any, normalizer: Any = None, pre: Any = None, added: tuple[str, ...] = ()
) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre:
        tokenizer.pre_tokenizer = pre
    sample = [document.decode() for document in corpus.pydocs()[0][:2]] + [text_of(1, 20_000)]
    tokenizer.train_from_iterator(sample if pre else (line for text in sample for line in text.split()), trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer_of(tokenizer.to_str())  # as the verb reads it


def bpe(pre: Any, normalizer: Any = None, **more: Any) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    return trained(models.BPE(), trainer, normalizer, pre, **more)


def level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), level(use_regex=False)])


def unigram(pre: Any) -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=400, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    return trained(models.Unigram(), trainer, normalizers.NFKC(), pre)


def word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=400, show_progress=False, special_tokens=["[UNK]"])
    pre = pre_tokenizers.BertPreTokenizer()
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, normalizers.BertNormalizer(), pre)


MAKE = {
    "GPT-2's": lambda: bpe(level()),
    "a space before each text": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "cl100k's": lambda: bpe(split(CL100K)),
    "single digits": lambda: bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level()])),
    "digits by four": lambda: bpe(split(r"\p{N}{1,4}|\p{L}+|[^\p{L}\p{N}]+")),
    "NFC": lambda: bpe(level(), normalizers.NFC()),
    "NFKD, lower letters": lambda: bpe(level(), normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])),
    "stripped": lambda: bpe(level(), normalizers.Strip()),
    "tokens of spaces": lambda: bpe(level(), added=("    ", "  ", "e", "don't", "\n\n")),
    "Metaspace": lambda: bpe(pre_tokenizers.Metaspace()),
    "Metaspace, first only": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "unigram": lambda: unigram(pre_tokenizers.Metaspace()),
    "WordPiece": word_piece,
    "lines": lambda: bpe(split(r"\n", "merged_with_previous")),
    "Metaspace, one word": lambda: bpe(pre_tokenizers.Metaspace(split=False)),
}
"""All but the last find places in ordinary text."""


@pytest.mark.parametrize("kind", MAKE)
def test_the_pieces_tokens_are_those_of_the_whole(kind: str) -> None:
    tokenizer = MAKE[kind]()
    cut = 0
    for seed in range(SEEDS):
        text = text_of(seed, 10_000)
        parts = list(pieces(tokenizer, text, 2_000))
        assert "".join(parts) == text
        cut += len(parts) - 1
        ids = [number for part in parts for number in tokenizer.encode(part, add_special_tokens=False).ids]
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert cut > 2 * SEEDS or kind in ("Metaspace, one word", "lines")


def test_without_words_it_is_left_whole() -> None:
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    legacy = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer = trained(models.BPE(), trainer, normalizers.Sequence(legacy))
    assert len(list(pieces(tokenizer, "some words " * 1000, 100))) == 1
    level = MAKE["GPT-2's"]()
    assert len(list(pieces(level, "a" * 20_000, 100))) == 1
    parts = list(pieces(level, "some words " * 100 + "a" * 5_000 + " and some more" * 100, 300))
    assert len(parts) > 4 and max(map(len, parts)) < 5_700  # a long word costs no more than itself
