"""JSON as every reader takes it. Python's own writes NaN and Infinity, which no standard knows, and halves of letters,
where the locale is C and a path has other letters: jq, JavaScript and databases refuse the whole file. All that this
project writes or prints as JSON comes from here.
"""

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(content: Any, **options: Any) -> str:
    """json.dumps, with null for every number that is not finite, and whole letters. options: json.dumps's own."""
    return json.dumps(_strict(content), allow_nan=False, **options)


def _strict(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, str):
        return content if content.isascii() else _whole(content)
    if isinstance(content, Mapping):
        return {_strict(key): _strict(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    return content


def _whole(text: str) -> str:
    """A text whose single bytes (halves of a surrogate pair, to Python) are letters again, or question marks."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
