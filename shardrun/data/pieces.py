"""A large document in pieces whose tokens, one after another, are those of the whole.

A tokenizer cuts text into words first (its pre-tokenizer) and then makes tokens of each word by itself. So a document
may be cut wherever a word ends for sure. That is looked up: around a place both halves are cut into words and encoded,
and so is the whole, and the place is taken where nothing differs. A tokenizer without a pre-tokenizer has one word, the
document, and is given it whole: its memory then grows with the document, by some hundred bytes a byte.
"""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

AROUND = 401
"""Characters on either side of a place that are looked at. Words are shorter, but for what has no words. A prime: long
numbers are often cut into groups of so many digits, and what is looked at may begin within a group.
"""

TRIES = 200
"""Places looked at before one of the next ones is taken."""


def pieces(tokenizer: Any, text: str, length: int) -> Iterator[str]:
    """The text in pieces of about `length` characters; longer ones where it cannot be cut."""
    begin = 0
    if tokenizer.pre_tokenizer is None:
        length = len(text)
    while len(text) - begin > length:
        place = next((place for place in _places(text, begin, begin + length) if _is_clean(tokenizer, text, place)), 0)
        if not place:
            break
        yield text[begin:place]
        begin = place
    yield text[begin:]


def _places(text: str, begin: int, end: int) -> Iterator[int]:
    """Where the text might be cut, the likeliest first, backwards from `end`: before a space between two words, before
    the end of a line, anywhere. Where none is good, the same behind `end`.
    """
    before = range(end, begin + (end - begin) // 2, -1)
    yield from islice((place for place in before if text[place] == " " and _joins(text, place)), TRIES)
    yield from islice((place for place in before if text[place] == "\n" and not text[place - 1].isspace()), TRIES)
    yield from islice(before, TRIES)
    yield from islice((found.start() for found in ANOTHER_KIND.finditer(text, end)), TRIES)


ANOTHER_KIND = re.compile(r"(?<=\S)(?=\s)|(?<=[^\W\d_])(?=[\W\d_])|(?<=\d)(?=\D)|(?<=[^\w\s])(?=\w)")
"""Behind a long run of letters, digits, signs or spaces."""


def _joins(text: str, place: int) -> bool:
    """A single space between two letters."""
    return text[place - 1].isalpha() and place + 1 < len(text) and text[place + 1].isalpha()


def _is_clean(tokenizer: Any, text: str, place: int) -> bool:
    left, right = text[max(0, place - AROUND) : place], text[place : place + AROUND]
    before, behind = _words(tokenizer, left), _words(tokenizer, right)
    if not before or not behind or before + behind != _words(tokenizer, left + right):
        return False  # no words: a normalizer that strips a text would take away spaces that stand in the middle of it
    one, other, both = (_encode(tokenizer, part) for part in (left, right, left + right))
    return one + other == both


def _words(tokenizer: Any, text: str) -> list[str]:
    normalized = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
