"""What a field of the configuration may be: said in the field's type, checked here. Plain Python, no torch.

    clip: Annotated[float, Range(0, zero="off")] = 1.0

`check_ranges` looks at every field of a dataclass, and at those of the dataclasses in it. A test holds each number's
docstring, which is its --help, to the same words. Upper limits of whole numbers lie far above what anybody trains: a
slip of the finger ends in a sentence, and not in an hour of waiting or without memory. What two fields say of each
other is checked elsewhere (speedrun/wiring.py, speedrun/stages.py, speedrun/optim/policy.py, speedrun/run/checks.py).
"""

import dataclasses
import math
import os
import types
import unicodedata
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from strategies.errors import UserError

LONGEST_PATH = 4095
"""Bytes of the longest path that Linux opens."""

LONGEST_PART = 255
"""Bytes of the longest name in a path."""

LONGEST_NAME = 200
"""Bytes of the longest folder name here: file systems take 255, and some of them fewer letters of other scripts."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers that are allowed: at least `least`, more than `above`, at most `most`, less than `below`. NaN and the
    infinities never are."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    zero: str = ""
    """What 0 means, where it is allowed and switches something off."""

    def allows(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.zero and value == 0:
            return True
        finite = -math.inf < value < math.inf
        return finite and self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        """In words: `0 (off) or above`, `from 1 to 1,000`, `from 0 to below 1`."""
        zero = f"0 ({self.zero})" if self.zero else "0"
        high = f" to {_number(self.most)}" if self.most < math.inf else ""
        high = f" to below {_number(self.below)}" if self.below < math.inf else high
        if self.above > -math.inf:
            words = f"above {_number(self.above)}{' and up' if high else ''}{high}"
        else:
            least = zero if self.least == 0 else _number(self.least)
            words = f"from {least}{high}" if high else f"{least} or above"
        return f"{zero}, or {words}" if self.zero and self.least != 0 else words


@dataclasses.dataclass(frozen=True)
class Text:
    """Texts that are allowed: on one line, not blank, and no longer than a path can be."""

    empty: bool = False
    """It may be empty."""
    name: bool = False
    """It names one folder inside another, and leads nowhere else."""

    def allows(self, value: Any) -> bool:
        if not isinstance(value, str) or (value and not value.strip()) or (not value and not self.empty):
            return False
        try:
            length, part = len(os.fsencode(value)), max(map(len, os.fsencode(value).split(b"/")))
        except UnicodeEncodeError:  # half of a surrogate pair: the name of no file
            return False
        if length > (LONGEST_NAME if self.name else LONGEST_PATH) or part > LONGEST_PART:
            return False
        if any(unicodedata.category(letter) == "Cc" for letter in value):
            return False
        return not self.name or (value == value.strip() and value not in (".", "..") and not set("/\\") & set(value))

    def __str__(self) -> str:
        most = LONGEST_NAME if self.name else LONGEST_PATH
        empty = "empty, or " if self.empty else ""
        if self.name:
            return f"{empty}one name of at most {most} bytes: no slash, no `..`, no space around it"
        return f"{empty}one line of at most {most:,} bytes, {LONGEST_PART} from slash to slash, and not blank"


def check_ranges(config: Any, prefix: str = "") -> None:
    """Look at every field of a dataclass; prefix: of the fields' names, such as `model.`.

    Raises UserError for the first that is not allowed, with its name as the command line has it, value and range.
    """
    assert dataclasses.is_dataclass(config)
    for name, hint in hints(type(config)).items():
        _check(f"{prefix}{name}", getattr(config, name), hint)


def hints(kind: type[Any]) -> dict[str, Any]:
    """A dataclass's field → its type, with what is allowed."""
    return get_type_hints(kind, include_extras=True)


def allowed_by(hint: Any) -> list[Range | Text]:
    """What a field's type says of its value, or of each of its values where it is a tuple."""
    if get_origin(hint) is Annotated:
        return [extra for extra in get_args(hint)[1:] if isinstance(extra, Range | Text)]
    if get_origin(hint) in (tuple, Union, types.UnionType):
        return [allowed for part in get_args(hint) for allowed in allowed_by(part)]
    return []


def _check(name: str, value: Any, hint: Any) -> None:
    if dataclasses.is_dataclass(value):
        check_ranges(value, f"{name}.")
    elif get_origin(hint) in (Union, types.UnionType):  # T | None
        if value is not None:
            _check(name, value, next(part for part in get_args(hint) if part is not type(None)))
    elif get_origin(hint) is tuple:
        parts = get_args(hint)
        many = parts[-1] is Ellipsis
        if not many and len(value) != len(parts):
            raise UserError(f"{name} has {len(value)} values, but must have {len(parts)}")
        for i, element in enumerate(value):
            part = parts[0] if many else parts[i]
            if dataclasses.is_dataclass(element):
                _check(f"{name}.{i}", element, part)
            for allowed in allowed_by(part):
                if not allowed.allows(element):
                    raise UserError(_sentence(name, " ".join(map(_shown, value)), element, str(allowed), "each "))
    elif get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{name} is {_shown(value)}, but must be {' or '.join(map(str, get_args(hint)))}")
    else:
        for allowed in allowed_by(hint):
            if not allowed.allows(value):
                raise UserError(_sentence(name, _shown(value), value, str(allowed)))


def _sentence(name: str, shown: str, value: Any, allowed: str, each: str = "") -> str:
    finite = "" if isinstance(value, str) or -math.inf < value < math.inf else "a finite number, "
    return f"{name} is {shown}, but {each}must be {finite}{allowed}"


def _shown(value: Any) -> str:
    """A value in a sentence, of 60 characters at most."""
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(value: float) -> str:
    """1000000 → 1,000,000; 1e-30 as it is."""
    return f"{int(value):,}" if value == int(value) and abs(value) <= 10**15 else f"{value:g}"
