"""Runs the kernel of a file in Triton's interpreter, on the CPU, in a process of its own.

    python interpreter.py FILE.py FUNCTION CASES.pt RESULTS.pt

Of its own, because the interpreter has to be asked for before Triton is imported. CASES.pt holds a list of
dictionaries: a [rows, depth] and b [columns, depth] in FP8, scale, block, and `around`: what lies in memory before and
behind the operands, where nobody should read. RESULTS.pt gets for each the float32 buffer that c [rows, columns] lies
in, and in words which operand was read beyond its end ("" for none); or in place of the list a sentence or "unsolved".
"""

import importlib.util
import os
import sys
import traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

GUARD = 4096
"""Elements around every matrix."""
UNTOUCHED = 12345.0
"""What the result's buffer holds before the kernel runs."""


def guarded(matrix: Tensor, around: float) -> Tensor:
    """The same matrix, contiguous, with GUARD elements of `around` before and behind it in memory."""
    buffer = torch.full((matrix.numel() + 2 * GUARD,), around).to(matrix.dtype)
    inside = buffer[GUARD:-GUARD].view(matrix.shape)
    return inside.copy_(matrix)


class Reads:
    """Stands for the interpreter's memory: every load goes through here, and is looked at.

    Masked elements are not read, and do not count; the rest has to lie in one of the operands.
    """

    def __init__(self, real) -> None:
        self.real, self.operands, self.outside = real, {}, ""

    def __getattr__(self, name):
        return getattr(self.real, name)

    def load(self, pointers, mask, *rest):
        read = np.broadcast_to(pointers, mask.shape)[mask.astype(bool)]
        inside = np.zeros(read.shape, dtype=bool)
        for first, end in self.operands.values():
            inside |= (read >= first) & (read < end)
        if not inside.all() and not self.outside:
            beyond = int(read[~inside][0])
            self.outside = min(self.operands, key=lambda name: min(abs(beyond - at) for at in self.operands[name]))
        return self.real.load(pointers, mask, *rest)


def launch(function, a: Tensor, b: Tensor, scale: float, block: int, around: float) -> tuple[Tensor, str]:
    """Run the kernel on a grid of tiles; returns the buffer of c, guards included, and what was read beyond its end."""
    import triton
    import triton.runtime.interpreter as interpreted

    (rows, depth), columns = a.shape, b.shape[0]
    kernel = triton.jit(function)
    c = torch.full((rows * columns + 2 * GUARD,), UNTOUCHED)
    grid = (triton.cdiv(rows, block), triton.cdiv(columns, block))
    mine, other = guarded(a, around), guarded(b, around)
    reads = Reads(interpreted._interpreter)
    reads.operands = {n: (t.data_ptr(), t.data_ptr() + t.numel()) for n, t in (("A", mine), ("B", other))}
    interpreted._interpreter = reads
    try:
        kernel[grid](mine, other, c[GUARD:], scale, rows, columns, depth, BLOCK=block)
    finally:
        interpreted._interpreter = reads.real
    return c, reads.outside


def main(path: str, name: str, cases: str, results: str) -> None:
    spec = importlib.util.spec_from_file_location("kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)
    try:
        found = [launch(getattr(module, name), **case) for case in torch.load(cases)]
    except Exception as error:
        while error.__cause__ is not None:  # the interpreter's own error only says that there was one
            error = error.__cause__
        unsolved = type(error) is NotImplementedError and not str(error) and place(error, path) and is_own(error, path)
        found = "unsolved" if unsolved else f"{Path(path).name}: {place(error, path)}{type(error).__name__}: {error}"
    torch.save(found, results)


def is_own(error: BaseException, path: str) -> bool:
    """Whether the last line that led to an error is one of the file, and not of Triton."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename == path


def place(error: BaseException, path: str) -> str:
    """The line of the file that led to an error."""
    trace, lines = error.__traceback__, []
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f"line {lines[-1]}, " if lines else ""


if __name__ == "__main__":
    main(*sys.argv[1:])
