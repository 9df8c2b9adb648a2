"""Values of a config that comes from anywhere: read, bounded and shown. Plain Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 2**16
"""A config file larger than this is not one."""


def flag(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable says true, as accelerate exports it."""
    return environ.get(name, "false").lower() == "true"


def short(value: Any) -> str:
    """A value in a sentence: on one line, of 60 characters at most."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # an integer with more digits than Python prints
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_bounded(path: Path) -> str:
    """A file's text. Raises FileNotFoundError, and ValueError where it is no text or too large for a config."""
    if not path.exists():
        raise FileNotFoundError(f"there is no config {path}.")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name the config itself.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a config has a few hundred, and {MAX_BYTES:,} at most are read.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error.reason} at byte {error.start}.") from error


def section(path: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A nested section, empty where the file has none. Raises ValueError where it is something else."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {key} is {short(found)}, not a section with keys of its own.")
    return {str(name): value for name, value in found.items()}


def positive(path: Path | str, key: str, value: Any) -> int:
    """A count from 1 on, as a number or, as accelerate takes it too, as text. Raises ValueError for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**9:
        raise ValueError(f"{path}: {key} is {short(value)}; write a whole number from 1 on.")
    return value
