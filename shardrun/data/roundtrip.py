"""A tokenizer, and whether text comes back out of its tokens: encoded, decoded, compared, for every document.

Loaded in worker processes: it imports nothing but tokenizers and numpy.
"""

import json
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strategies.errors import UserError

EXCERPT = 24
"""Characters shown from where text and decoded text part."""

STARTS = (
    *("<|endoftext|>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<s>", "<bos>", "[BOS]", "<|startoftext|>"),
    *("<|end_of_text|>", "</s>", "<eos>", "[EOS]"),
)
"""Special tokens that may stand before a document, the first that is there."""


def load_tokenizer(path: Path) -> Any:
    """Read a tokenizer file (`tokenizer.json`) for text as it is: nothing cut, nothing padded, no special tokens.

    Text that spells a special token ("<|endoftext|>") becomes ordinary tokens, or it would begin a document of its own.

    Raises:
        ValueError: no tokenizer file.
    """
    from tokenizers import Tokenizer

    try:
        return _for_plain_text(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"{path} is no tokenizer file in the form of tokenizer.json ({error}).") from error


def tokenizer_of(definition: str) -> Any:
    """The same of a file's content."""
    from tokenizers import Tokenizer

    return _for_plain_text(Tokenizer.from_str(definition))


def size_and_start(tokenizer: Any) -> tuple[int, int]:
    """(vocabulary's size, document start): the special token that it puts before a text itself, or one of `STARTS`, or
    one that is added behind the last.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    special = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    first = _first_of_its_own(tokenizer)
    if first in special:
        return size, first
    by_name = {name: number for number, name in special.items()}
    start = next((by_name[name] for name in STARTS if name in by_name), size)
    return max(size, start + 1), start


def _first_of_its_own(tokenizer: Any) -> int:
    """The token that the tokenizer puts before a text; -1 for none."""
    try:
        given, plain = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
    except Exception:  # a tokenizer that cannot encode it: of that we hear later
        return -1
    return given[0] if given and given[:1] != plain[:1] else -1


def unknown_token(definition: str, tokenizer: Any) -> int:
    """The number of the token that stands for what the tokenizer does not know; -1 for none."""
    model = json.loads(definition).get("model") or {}
    named = model.get("unk_token")
    number = tokenizer.token_to_id(named) if isinstance(named, str) else model.get("unk_id")
    return number if isinstance(number, int) else -1


class TokenizerError(UserError):
    """What a tokenizer did wrong, as the rest of a sentence that names it."""


@dataclass
class Loss:
    """What did not come back, over some documents. False where all did."""

    text_bytes: int = 0
    tokens: int = 0
    """Of text, without document starts."""
    unknown: int = 0
    """Tokens that say only that something was there."""
    changed: int = 0
    """Documents that differ when decoded, beyond `other_form`."""
    lost_bytes: int = 0
    """Of characters that are missing in these."""
    other_form: int = 0
    """Documents that come back with the same characters in another normal form, or with a space before them."""
    example: str = ""
    """Where the first one differs, in words."""

    def __bool__(self) -> bool:
        return bool(self.changed or self.unknown)

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(
            self.text_bytes + other.text_bytes,
            self.tokens + other.tokens,
            self.unknown + other.unknown,
            self.changed + other.changed,
            self.lost_bytes + other.lost_bytes,
            self.other_form + other.other_form,
            self.example or other.example,
        )

    def in_words(self) -> str:
        """Shares of what was lost, and an example."""
        parts = []
        if self.unknown:
            parts.append(f"{self.unknown:,} of {self.tokens:,} tokens are unknown ({self.unknown / self.tokens:.1%})")
        if self.changed:
            share = f"{self.lost_bytes:,} of {self.text_bytes:,} bytes do not come back"
            parts.append(f"{share} ({self.lost_bytes / self.text_bytes:.1%})")
        return ", ".join(parts) + (f"; {self.example}" if self.example else "")


class Encoder:
    """A tokenizer that encodes documents and compares what comes back."""

    def __init__(self, definition: str) -> None:
        self.tokenizer = tokenizer_of(definition)
        self.size, self.start = size_and_start(self.tokenizer)
        self.unknown = unknown_token(definition, self.tokenizer)

    def encode(self, documents: list[tuple[str, bytes]], goes_on: bool = False) -> tuple[np.ndarray, Loss]:
        """(name, text as UTF-8) of documents → their tokens, uint32, with the document start before each; and what of
        them is lost. goes_on: it is a further piece of one document, and begins none.

        Raises:
            TokenizerError: it fails, or gives text the document start.
        """
        tokens: list[int] = []
        loss = Loss()
        for name, document in documents:
            text = document.decode()
            try:
                numbers = self.tokenizer.encode(text, add_special_tokens=False).ids
                back = self.tokenizer.decode(numbers, skip_special_tokens=False)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic of its Rust code is no Exception, and cannot be sent to the parent
                raise TokenizerError(f"it cannot encode {name} ({error}); give another.") from None
            if self.start in numbers:
                raise TokenizerError(
                    f"it gives text of {name} the token {self.start}, which begins a document; give another."
                )
            if goes_on and text.startswith(" ") and text[1:] == back:
                back = text  # the space is in the first token, and only the beginning of a text is decoded without it
            tokens.extend(numbers if goes_on else (self.start, *numbers))
            loss += self._compare(name, text, numbers, back)
        return np.array(tokens, dtype=np.uint32), loss

    def _compare(self, name: str, text: str, numbers: list[int], back: str) -> Loss:
        loss = Loss(len(text.encode()), len(numbers), numbers.count(self.unknown))
        if back == text:
            return loss
        form, wanted = unicodedata.normalize("NFC", back), unicodedata.normalize("NFC", text)
        if form in (wanted, " " + wanted):
            loss.other_form = 1
            return loss
        known = [number for number in numbers if number != self.unknown]
        came = Counter(self.tokenizer.decode(known, skip_special_tokens=False))
        missing = Counter(text) - came
        loss.changed = 1
        loss.lost_bytes = sum(len(character.encode()) * count for character, count in missing.items())
        loss.example = f"in {name}, {_differing(text, back)}"
        normalizer = self.tokenizer.normalizer
        if normalizer is not None and normalizer.normalize_str(text) != text:
            loss.example += " (its normalizer rewrites text)"
        return loss


def _differing(text: str, back: str) -> str:
    """Where two texts part, a few characters of each."""
    where = next((i for i, (one, other) in enumerate(zip(text, back, strict=False)) if one != other), -1)
    where = min(len(text), len(back)) if where < 0 else where
    begin = max(0, where - EXCERPT // 3)
    one, other = (repr(piece[begin : begin + EXCERPT]) for piece in (text, back))
    return f"{one} comes back as {other}"


def _for_plain_text(tokenizer: Any) -> Any:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "as ordinary text", in spite of its name
    return tokenizer
