"""One rank's file: flat tensors in the safetensors format, hashed while they are written.

The format (github.com/huggingface/safetensors) is 8 bytes of header length, a JSON header that gives every tensor its
dtype, shape and place, and the numbers. We write it ourselves, so that the bytes pass the hash on their way and no
second copy of them is made; the library reads it back.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from strategies import strict_json
from strategies.checkpoint.format import ITEM_BYTES, Piece, Stored
from strategies.errors import UserError
from strategies.layout import Interval

DTYPES = {"float32": ("F32", torch.float32), "uint8": ("U8", torch.uint8)}
"""Our name → safetensors' and torch's."""

CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Written:
    """A file that has been written: its bytes and their SHA-256."""

    size: int
    sha256: str


def write_shard(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> Written:
    """Write contiguous CPU tensors (float32 or uint8) under their names, through to the disk.

    read: gives a tensor by its name when it is its turn, so that they are not all there at once; `tensors` then only
    say dtypes and shapes, and may be on the meta device. Raises OSError where the disk does not take it.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # keeps float32 aligned
    for name, tensor in ordered.items():
        (dtype,) = (theirs for theirs, ours in DTYPES.values() if ours == tensor.dtype)
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = strict_json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            file.write(block)
        for name, described in ordered.items():
            tensor = read(name) if read else described
            numbers = memoryview(tensor.view(-1).numpy().data).cast("B") if tensor.numel() else memoryview(b"")
            for start in range(0, len(numbers), CHUNK_BYTES):
                digest.update(numbers[start : start + CHUNK_BYTES])
                file.write(numbers[start : start + CHUNK_BYTES])
        file.flush()
        os.fsync(file.fileno())
    return Written(8 + len(text) + offset, digest.hexdigest())


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class Shards:
    """The shards of a checkpoint folder, open for reading; a context that closes them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: dict[str, object] = {}
        self._begins: dict[str, dict[str, int]] = {}
        """File → tensor → the byte at which its numbers begin."""

    def read(self, name: str, tensor: Stored, wanted: Interval, out: Tensor) -> None:
        """Read elements [wanted.start, wanted.stop) of a stored tensor into `out`, flat, of its dtype.

        Straight into `out` where that is in host memory; for another device CHUNK_BYTES at a time. safetensors checks
        the file, but does not hand out the numbers: what it maps into memory would stay in the process, beside `out`.

        Raises ValueError, naming the file, where a file does not hold what the index says.
        """
        for piece, common in tensor.overlapping(wanted):
            self._slice(name, tensor, piece)
            begin = self._begin(piece.file)[name] + (common.start - piece.start) * out.element_size()
            with open(self.folder / piece.file, "rb", buffering=0) as file:
                file.seek(begin)
                here = out[common.start - wanted.start : common.stop - wanted.start]
                for part in here.split(CHUNK_BYTES // out.element_size()):
                    self._fill(file, part)

    def _begin(self, name: str) -> dict[str, int]:
        if name not in self._begins:
            with open(self.folder / name, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            self._begins[name] = {tensor: 8 + length + said["data_offsets"][0] for tensor, said in header.items()}
        return self._begins[name]

    def _fill(self, file: io.FileIO, out: Tensor) -> None:
        host = out if out.device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype)
        rest = memoryview(host.numpy().data).cast("B")
        while rest:
            if not (got := file.readinto(rest)):
                raise UserError(f"{file.name!s} is damaged: it ends too early; use another checkpoint.")
            rest = rest[got:]
        if host is not out:
            out.copy_(host)

    def check(self, tensors: Mapping[str, Stored]) -> None:
        """Raise ValueError where some piece does not lie in its file as the index says. Reads no numbers."""
        for name, tensor in tensors.items():
            for piece in tensor.pieces:
                self._slice(name, tensor, piece)

    def whole(self, name: str, tensor: Stored) -> Tensor:
        """A stored tensor in its shape, on the CPU."""
        self.check({name: tensor})  # before memory is taken for it: the files must hold that many
        out = torch.empty(tensor.numel, dtype=DTYPES[tensor.dtype][1])
        self.read(name, tensor, Interval(0, tensor.numel), out)
        return out.view(tensor.shape)

    def _slice(self, name: str, tensor: Stored, piece: Piece):  # type: ignore[no-untyped-def]  # safetensors has no types
        from safetensors import SafetensorError, safe_open

        path = self.folder / piece.file
        try:
            if piece.file not in self._open:
                self._open[piece.file] = safe_open(path, framework="pt").__enter__()
            found = self._open[piece.file].get_slice(name)  # type: ignore[attr-defined]
            held = (found.get_dtype(), found.get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is damaged: it cannot be read as safetensors ({error}); use another checkpoint."
            ) from error
        if held != (DTYPES[tensor.dtype][0], [piece.stop - piece.start]):
            raise UserError(
                f"{path} is damaged: {name} is {held[0]} {held[1]} there, and the index says "
                f"{tensor.dtype} of {piece.stop - piece.start} elements; use another checkpoint."
            )
        return found

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)  # type: ignore[attr-defined]


assert set(DTYPES) == set(ITEM_BYTES)
