"""JSON as every reader takes it. Python's own writes NaN and Infinity, which no standard knows: jq, JavaScript and
databases refuse the whole file. All that this project writes or prints as JSON comes from here.
"""

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(content: Any, **options: Any) -> str:
    """json.dumps, with null for every number that is not finite. options: json.dumps's own."""
    return json.dumps(_strict(content), allow_nan=False, **options)


def _strict(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _strict(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    return content
