"""Ways to damage a checkpoint, by hand and behind the back of its hashes."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from strategies.checkpoint.format import INDEX, SUMS, read_index, read_sums, sums_text
from strategies.checkpoint.shards import write_shard


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Turn one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def reseal(folder: Path) -> None:
    """Hash every file again, as an attacker would who has changed some."""
    names = [name for name in read_sums(folder) if (folder / name).exists()]
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / SUMS).write_text(sums_text(hashes))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index and hash it again."""
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))
    reseal(folder)


def spoil(folder: Path, name: str, value: float = math.nan, seen: bool = False) -> None:
    """Put a value into the middle of a tensor, with right hashes, as a version that did not look would have saved it.

    seen: leave in the index that the files were found finite when they had other bytes.
    """
    piece = read_index(folder).tensors[name].pieces[-1]
    tensors = {other: tensor.clone() for other, tensor in load_file(folder / piece.file).items()}
    tensors[name][tensors[name].numel() // 2] = value
    write_shard(folder / piece.file, tensors)
    reseal(folder)
    if not seen:
        edit_index(folder, lambda content: content.pop("finite", None))
