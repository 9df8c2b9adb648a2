"""The index of a checkpoint: what is in it and where. Plain Python, without torch.

    {"format": "shardrun checkpoint", "version": 1, "step": 10, "loss_scale": {"scale": …, …} (of an fp16 run),
     "saved_by": {"strategy": …, "world_size": 2, …}, "run": {… whatever the trainer wants to find again …},
     "files": {"rank_000.safetensors": <bytes>, …},
     "finite": {"rank_000.safetensors": <SHA-256 of it, when all its values were seen to be finite>, …},
     "tensors": {"weight/embed.weight": {"shape": [257, 48], "dtype": "float32",
                                         "pieces": [["rank_000.safetensors", 0, 6192], …]}, …}}

A piece is elements [start, stop) of the flattened tensor, stored flat under the tensor's name in that file. Pieces
cover their tensor exactly once.

An index comes from a disk, and so from anywhere: `read_index` returns one that keeps every promise above, or raises
ValueError with a sentence that names the file.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from strategies import strict_json
from strategies.errors import UserError
from strategies.layout import Interval, Shape

FORMAT = "shardrun checkpoint"
VERSION = 1
INDEX, SUMS = "index.json", "SHA256SUMS"
ITEM_BYTES = {"float32": 4, "uint8": 1}
"""dtype → bytes of an element: weights and optimizer states, and generators' states."""

LOSS_SCALE = {"scale", "clean_steps", "hysteresis"}

MAX_INDEX_BYTES = 64 * 2**20
"""A 124M model saved by a thousand ranks has an index of some 20 MB; a larger one is not ours to read."""

SHARD_NAME = re.compile(r"rank_\d{3,6}\.safetensors")
SUMS_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_.]+)")


def shard_name(rank: int) -> str:
    """The file that this rank writes."""
    return f"rank_{rank:03d}.safetensors"


class Piece(NamedTuple):
    """Elements [start, stop) of a flattened tensor, and the file that holds them."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    shape: Shape
    dtype: str
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def overlapping(self, wanted: Interval) -> list[tuple[Piece, Interval]]:
        """The pieces that hold some of these elements, and which elements those are."""
        found = []
        for piece in self.pieces:
            common = Interval(max(piece.start, wanted.start), min(piece.stop, wanted.stop))
            if common.numel > 0:
                found.append((piece, common))
        return found


@dataclass(frozen=True)
class Index:
    """What `index.json` says. `run` is the trainer's own: it is handed back as it was given."""

    step: int
    saved_by: dict[str, Any]
    run: dict[str, Any]
    files: dict[str, int]
    """File → bytes."""
    tensors: dict[str, Stored]
    loss_scale: dict[str, Any] | None = None
    """fp16's (strategies.loss_scale.LossScale.state); None in another precision, and where an older version saved."""
    finite: dict[str, str] = field(default_factory=dict)
    """File → SHA-256 of it when all its values were seen to be finite; empty where an older version saved."""


def index_json(index: Index) -> bytes:
    """The index as it is written."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": index.step,
        "saved_by": index.saved_by,
        "run": index.run,
        **({"loss_scale": index.loss_scale} if index.loss_scale else {}),
        "files": index.files,
        **({"finite": index.finite} if index.finite else {}),
        "tensors": {
            name: {"shape": tensor.shape, "dtype": tensor.dtype, "pieces": tensor.pieces}
            for name, tensor in index.tensors.items()
        },
    }
    return (strict_json.dumps(content, indent=1) + "\n").encode()


def sums_text(hashes: dict[str, str]) -> str:
    """File → SHA-256 in hex, as `sha256sum` prints it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))


def read_sums(folder: Path) -> dict[str, str]:
    """File → SHA-256 of every file of a checkpoint but SHA256SUMS itself.

    Raises FileNotFoundError where there is none, ValueError where it is not as we write it.
    """
    path = folder / SUMS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a complete checkpoint: {SUMS} is missing; use another one.")
    try:
        text = _read_bounded(path).decode("ascii")
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not plain text; use another checkpoint.") from None
    matches = [SUMS_LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    hashes = {match[2]: match[1] for match in matches if match}
    if not text.endswith("\n") or len(hashes) != len(matches) or sums_text(hashes) != text:
        raise UserError(f"{path} is damaged: it is not as it was written; use another checkpoint.")
    return hashes


def read_index(folder: Path) -> Index:
    """Read and check the index, its hash included, and that every file is there with its size. Reads no tensor.

    Raises FileNotFoundError or ValueError, naming the file, for everything that is not as it was written.
    """
    hashes = read_sums(folder)
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is not a complete checkpoint; use another one.")
    written = _read_bounded(path)
    if hashes.get(INDEX) != hashlib.sha256(written).hexdigest():
        raise UserError(f"{path} is damaged: its hash is not the one in {SUMS}; use another checkpoint.")
    index = parse_index(written, path)
    if set(hashes) != {*index.files, INDEX}:
        raise UserError(f"{folder / SUMS} is damaged: it does not list the files of {INDEX}; use another checkpoint.")
    for name, size in index.files.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {folder} is not a complete checkpoint; use another one.")
        if file.stat().st_size != size:
            raise UserError(
                f"{file} has {file.stat().st_size:,} bytes in place of {size:,}: it was cut off or written over; "
                "use another checkpoint."
            )
    return index


def unseen(folder: Path, index: Index) -> set[str]:
    """The files of whose values nobody knows whether they are finite: written by an older version, or changed since.

    Raises ValueError or FileNotFoundError where SHA256SUMS is damaged.
    """
    hashes = read_sums(folder)
    return {file for file in index.files if index.finite.get(file) != hashes.get(file)}


def parse_index(written: bytes, path: Path) -> Index:
    """The index out of its file's bytes. Raises ValueError, naming `path`, where it breaks a promise of the format."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise UserError(f"{path} is damaged: {what}; use another checkpoint.")

    try:
        content = json.loads(written, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is damaged: it is not JSON; use another checkpoint.") from None
    need(isinstance(content, dict) and content.get("format") == FORMAT, f"it does not say that it is a {FORMAT}")
    version = content.get("version")
    need(_is_count(version), "it has no version")
    if version != VERSION:
        raise UserError(
            f"{path} has format version {version}, and this shardrun reads version {VERSION}: "
            f"{'update shardrun' if version > VERSION else 'use the shardrun that wrote it'}."
        )
    need(_is_count(content.get("step")), "its step is not a whole number")
    for part in ("saved_by", "run", "files", "tensors"):
        need(isinstance(content.get(part), dict), f"{part!r} is not there")
    files = content["files"]
    need(
        all(SHARD_NAME.fullmatch(name) and _is_count(size) for name, size in files.items()),
        "'files' holds something else than rank_NNN.safetensors with a size",
    )
    tensors = {}
    stored = dict.fromkeys(files, 0)
    for name, entry in content["tensors"].items():
        tensor = _parse_tensor(entry)
        need(tensor is not None, f"the entry of tensor {name[:100]!r} is not as it should be")
        assert tensor is not None
        need(_covers(tensor), f"the pieces of tensor {name[:100]!r} do not cover it exactly once")
        need(all(piece.file in files for piece in tensor.pieces), f"tensor {name[:100]!r} lies in a file not listed")
        for piece in tensor.pieces:
            stored[piece.file] += (piece.stop - piece.start) * ITEM_BYTES[tensor.dtype]
        tensors[name] = tensor
    for name, size in stored.items():
        need(size <= files[name], f"the pieces in {name} need more than its {files[name]:,} bytes")
    scale = content.get("loss_scale")
    need(scale is None or _is_loss_scale(scale), "its loss scale is not as it should be")
    finite = content.get("finite", {})
    hashes = finite.values() if isinstance(finite, dict) else [None]
    need(all(isinstance(sha256, str) for sha256 in hashes), "'finite' holds something else than a hash per file")
    return Index(content["step"], content["saved_by"], content["run"], files, tensors, scale, finite)


def _is_loss_scale(state: Any) -> bool:
    if not isinstance(state, dict) or not {"scale", "clean_steps"} <= state.keys() <= LOSS_SCALE:
        return False
    scale = state["scale"]
    counts = all(_is_count(value) for key, value in state.items() if key != "scale")
    return counts and type(scale) in (int, float) and 0 < scale < 2.0**1000


def _parse_tensor(entry: Any) -> Stored | None:
    if not isinstance(entry, dict) or entry.get("dtype") not in list(ITEM_BYTES):  # a list: what cannot be hashed too
        return None
    shape, pieces = entry.get("shape"), entry.get("pieces")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_count, shape)) or not isinstance(pieces, list):
        return None
    for piece in pieces:
        if not isinstance(piece, list) or len(piece) != 3 or not isinstance(piece[0], str):
            return None
        if not _is_count(piece[1]) or not _is_count(piece[2]):
            return None
    return Stored(tuple(shape), entry["dtype"], tuple(Piece(*piece) for piece in pieces))


def _covers(tensor: Stored) -> bool:
    """Whether the pieces, in the order in which they stand, follow one another from the first element to the last."""
    at = 0
    for piece in tensor.pieces:
        if piece.start != at or piece.stop <= piece.start:
            return False
        at = piece.stop
    return at == tensor.numel


def _is_count(value: Any) -> bool:
    """A whole number that is not negative and fits 63 bits; True and 1.0 are none."""
    return type(value) is int and 0 <= value < 2**63


def _no_constant(name: str) -> None:
    raise UserError(name)  # NaN and Infinity are not JSON


def _read_bounded(path: Path) -> bytes:
    with open(path, "rb") as file:
        written = file.read(MAX_INDEX_BYTES + 1)
    if len(written) > MAX_INDEX_BYTES:
        raise UserError(f"{path} is larger than {MAX_INDEX_BYTES:,} bytes, which no index is; use another checkpoint.")
    return written
