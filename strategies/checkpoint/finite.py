"""Checkpoints whose values are all finite, and those with a NaN or an infinity: such a state trains no further.

A checkpoint is not written where a value is not finite (save.py). Its index keeps, file by file, the hash of what was
found finite. So this is known without reading a tensor, and where a file was written by an older version, or changed
since, its tensors are read.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from strategies.checkpoint.format import Index, read_index, unseen
from strategies.checkpoint.shards import Shards
from strategies.layout import Interval

CHUNK = 2**22
"""Elements looked at together: they fit a processor's cache."""


def all_finite(tensor: Tensor) -> bool:
    """Whether a flat tensor in host memory has neither NaN nor infinity; one that is not of floats has none.

    A sum reads once and needs no memory. It is finite only where all are. The reverse does not hold for huge values, so
    then each is looked at.
    """
    if not tensor.is_floating_point():
        return True
    parts = (tensor[start : start + CHUNK] for start in range(0, tensor.numel(), CHUNK))
    return all(math.isfinite(part.sum().item()) or bool(torch.isfinite(part).all()) for part in parts)


def tensor_in_words(name: str) -> str:
    """A tensor of a checkpoint: `weight/embed.weight` → the weight embed.weight."""
    kind, _, parameter = name.partition("/")
    return f"the {kind} {parameter}" if kind == "weight" else f"the {kind} of {parameter}"


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor, weights before states, that is not finite."""
    names = sorted(tensors, key=lambda name: not name.startswith("weight/"))
    return next((name for name in names if not all_finite(tensors[name])), None)


def not_finite(folder: Path, index: Index, files: Collection[str] | None = None, kind: str = "") -> str | None:
    """In words the first tensor of a checkpoint that is not finite, None where all are.

    files: look only into these; kind: only at tensors whose name begins so (`weight/`). Raises ValueError or
    FileNotFoundError for a damaged checkpoint.
    """
    unknown = unseen(folder, index) & set(index.files if files is None else files)
    names = sorted(index.tensors, key=lambda name: not name.startswith("weight/"))
    with Shards(folder) as shards:
        for name in names if unknown else ():
            tensor = index.tensors[name]
            for piece in tensor.pieces if name.startswith(kind) and tensor.dtype == "float32" else ():
                for start in range(piece.start, piece.stop, CHUNK) if piece.file in unknown else ():
                    here = Interval(start, min(start + CHUNK, piece.stop))
                    part = torch.empty(here.numel)
                    shards.read(name, tensor, here, part)
                    if not all_finite(part):
                        return f"{tensor_in_words(name)} is not finite"
    return None


def newest_finite(folders: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The first of these checkpoints, newest first, that is finite; and a sentence for each one passed over.

    Raises ValueError or FileNotFoundError for a damaged checkpoint before it.
    """
    passed_over: list[str] = []
    for folder in folders:
        why = not_finite(folder, read_index(folder))
        if why is None:
            return folder, passed_over
        passed_over.append(f"{folder} is passed over: {why}")
    return None, passed_over
