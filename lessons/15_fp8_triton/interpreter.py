"""Runs a kernel in Triton's interpreter, on the CPU, and watches what it reads and writes.

Triton asks for TRITON_INTERPRET=1 where it is imported, and again at every kernel. The processes of a check have
imported it so (shardrun/lesson/interpreted.py).
"""

import os
from unittest import mock

import numpy as np
import torch
from torch import Tensor

GUARD = 4096
"""Elements around every matrix, where nobody should read or write."""
NAN = 0x7F
"""e4m3's nan, but for the sign."""
UNTOUCHED = 12345.0
"""What the result's buffer holds before the kernel runs."""


class TooFar(Exception):
    """Even the guards have been left: it is not read or written, for the process would end."""


def guarded(matrix: Tensor, around: float) -> Tensor:
    """The same matrix, contiguous, with GUARD elements of `around` before and behind it in memory."""
    buffer = torch.full((matrix.numel() + 2 * GUARD,), around).to(matrix.dtype)
    inside = buffer[GUARD:-GUARD].view(matrix.shape)
    return inside.copy_(matrix)


class Memory:
    """Stands for the interpreter's memory: every load and store goes through here, and is looked at.

    Masked elements are not read, and do not count. What stands in their place is undefined without `other`: nan here.
    `outside` names the operand that has been read beyond its end. Raises TooFar beyond the guards.
    """

    def __init__(self, real, tensors: dict[str, Tensor]) -> None:
        self.real, self.outside = real, ""
        self.other_given, self.undefined = True, False
        self.places = {name: (t.data_ptr(), t.data_ptr() + t.nbytes, t.itemsize) for name, t in tensors.items()}

    def __getattr__(self, name):
        return getattr(self.real, name)

    def load(self, pointers, mask, other, *rest):
        beyond = self._beyond(pointers, mask, 0, ("A", "B"))
        if beyond.size and not self.outside:
            self.outside = self._nearest(int(beyond[0]))
        self._not_too_far(pointers, mask, "read")
        if not self.other_given and not mask.all():
            self.undefined = True
            other = np.full(other.nbytes, NAN, np.uint8).view(other.dtype).reshape(other.shape)
        return self.real.load(pointers, mask, other, *rest)

    def store(self, pointers, value, mask, *rest):
        self._not_too_far(pointers, mask, "write")
        return self.real.store(pointers, value, mask, *rest)

    def _beyond(self, pointers, mask, guard, names):
        """The addresses that lie in none of the tensors of these names, nor `guard` elements around them."""
        used = np.broadcast_to(pointers, mask.shape)[mask.astype(bool)]
        inside = np.zeros(used.shape, dtype=bool)
        for first, end, size in (self.places[name] for name in names):
            inside |= (used >= first - guard * size) & (used < end + guard * size)
        return used[~inside]

    def _not_too_far(self, pointers, mask, verb):
        if (far := self._beyond(pointers, mask, GUARD, self.places)).size:
            name = self._nearest(int(far[0]))
            raise TooFar(f"you {verb} more than {GUARD} elements away from {name}: on a GPU that is an illegal access")

    def _nearest(self, address):
        return min(self.places, key=lambda name: min(abs(address - end) for end in self.places[name][:2]))


def with_nan(convert):
    """The interpreter's conversion of numbers, which takes e4m3's nan for 480."""

    def converted(numbers, given, wanted, *rest):
        found = convert(numbers, given, wanted, *rest)
        if str(given) == "fp8e4nv" and str(wanted) in ("fp16", "bf16", "fp32"):
            nan = {"fp16": 0x7E00, "bf16": 0x7FC0, "fp32": 0x7FC00000}[str(wanted)]
            found[(numbers.view(np.uint8) & NAN) == NAN] = nan
        return found

    return converted


def launch(function, a: Tensor, b: Tensor, scale: float, block: int, around: float) -> tuple[Tensor, str, bool]:
    """Run the kernel on a grid of tiles; returns the buffer of c, guards included, what was read beyond its end, and
    whether a load has left out elements without saying what stands in their place.

    a [rows, depth] and b [columns, depth] in FP8; around: what lies in memory before and behind them. Raises what the
    kernel raised, not the interpreter's words for it.
    """
    import triton
    import triton.language as tl
    import triton.runtime.interpreter as interpreted

    if not isinstance(tl.zeros, interpreted.InterpretedFunction):
        raise RuntimeError("Triton was imported before TRITON_INTERPRET=1 was in the environment")
    (rows, depth), columns = a.shape, b.shape[0]
    buffer = torch.full((rows * columns + 2 * GUARD,), UNTOUCHED)
    grid = (triton.cdiv(rows, block), triton.cdiv(columns, block))
    mine, other, c = guarded(a, around), guarded(b, around), buffer[GUARD : GUARD + rows * columns]
    memory = Memory(interpreted._interpreter, {"A": mine, "B": other, "the result": c})
    real_load = interpreted.InterpreterBuilder.create_masked_load

    def masked_load(builder, pointers, mask, other, *rest):
        memory.other_given = other is not None
        return real_load(builder, pointers, mask, other, *rest)

    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
        mock.patch.object(interpreted, "_interpreter", memory),
        mock.patch.object(interpreted.InterpreterBuilder, "create_masked_load", masked_load),
        mock.patch.object(interpreted, "_convert_float", with_nan(interpreted._convert_float)),
    ):
        kernel = triton.jit(function)
        try:
            kernel[grid](mine, other, c, scale, rows, columns, depth, BLOCK=block)
        except Exception as error:
            while error.__cause__ is not None:
                error = error.__cause__
            raise error from None
    return buffer, memory.outside, memory.undefined
