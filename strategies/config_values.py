"""Values of a config that comes from anywhere: read, bounded, coerced and shown. Plain Python.

accelerate and DeepSpeed coerce text, 0 and 1, yes and no in ways of their own. The functions here read a value as they
do; what they would stumble over is refused. Each takes the value as the file has it. Each raises ConfigError, whose
text says only what to write: the reader puts file, key and value before it.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from strategies.errors import UserError

MAX_BYTES = 2**16
"""A config file larger than this is not one."""

TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")
"""accelerate's words (`str_to_bool` in utils/environment.py), and pydantic's, which reads DeepSpeed's JSON."""


class ConfigError(UserError):
    """What is wrong with a config, in one sentence."""


def flag(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable says true, in one of accelerate's words."""
    return environ.get(name, "").lower() in TRUE


def short(value: Any) -> str:
    """A value in a sentence: on one line, of 60 characters at most."""
    try:
        text = " ".join(str(value).split()) or repr(value)
        text = "".join(letter if letter.isprintable() else "?" for letter in text)
    except ValueError:  # an integer with more digits than Python prints
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_bounded(path: Path) -> str:
    """A file's text. Raises FileNotFoundError, and ConfigError where it is no text or too large for a config."""
    if not path.exists():
        raise FileNotFoundError(f"there is no config {path}.")
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; name the config itself.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{path} has {size:,} bytes; a config has a few hundred, and {MAX_BYTES:,} at most are read.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error


def unchanged(value: Any) -> Any:
    """The value as it is."""
    return value


def truth(value: Any) -> bool:
    """True or false: a boolean, 0 or 1, or one of accelerate's words."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if isinstance(value, int | str) and word in TRUE + FALSE:
        return word in TRUE
    raise ConfigError("write true or false")


def whole(minimum: int = 1, maximum: int = 2**63 - 1) -> Callable[[Any], int]:
    """A whole number in these bounds, as a number (1.0 and 5e8 too) or as text of digits."""
    bounds = f"a whole number from {minimum} on" if maximum > 10**9 else f"a whole number from {minimum} to {maximum}"

    def read(value: Any) -> int:
        if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 20:
            value = int(value)
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise ConfigError(f"write {bounds}")
        return value

    return read


def number(minimum: float = 0.0) -> Callable[[Any], float]:
    """A finite number from a minimum on, as a number or as text."""

    def read(value: Any) -> float:
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found) or found < minimum:
            raise ConfigError(f"write a number from {minimum:g} on")
        return found

    return read


def choice(*names: str) -> Callable[[Any], str]:
    """One of these words, in any case; gives it as it stands here."""
    by_word = {name.lower(): name for name in names}

    def read(value: Any) -> str:
        found = by_word.get(value.strip().lower()) if isinstance(value, str) else None
        if found is None:
            raise ConfigError(f"write {' or '.join(filter(None, (', '.join(names[:-1]), names[-1])))}")
        return found

    return read


def nothing_said(value: Any) -> bool:
    """Whether a value asks for nothing: empty, off, none, "auto"."""
    if isinstance(value, Mapping):
        return all(nothing_said(part) for part in value.values())
    if isinstance(value, str):
        return value.strip().lower() in (*FALSE, "", "none", "null", "auto", "default")
    return value is None or value is False or value == 0 or value == []


def at_most_one(value: Any) -> bool:
    """Whether a size asks for nothing: one, or none at all."""
    return nothing_said(value) or (not isinstance(value, Mapping) and str(value).strip() == "1")


def not_enabled(value: Any) -> bool:
    """Whether a section of DeepSpeed's with a switch `enabled` asks for nothing."""
    if isinstance(value, Mapping):
        return nothing_said(value.get("enabled"))
    return nothing_said(value)
