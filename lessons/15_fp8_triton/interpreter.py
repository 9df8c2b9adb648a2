"""Runs the kernel of a file in Triton's interpreter, on the CPU, in a process of its own.

    python interpreter.py FILE.py FUNCTION CASES.pt RESULTS.pt

Of its own, because the interpreter has to be asked for before Triton is imported. CASES.pt holds a list of
dictionaries: a [rows, depth] and b [columns, depth] in FP8, scale, block, and `around`: what lies in memory before and
behind the operands, where nobody should read. RESULTS.pt gets for each the float32 buffer that c [rows, columns] lies
in, or in place of the list a sentence or "unsolved".
"""

import importlib.util
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

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


def launch(function, a: Tensor, b: Tensor, scale: float, block: int, around: float) -> Tensor:
    """Run the kernel on a grid of tiles; returns the buffer of c, guards included."""
    import triton

    (rows, depth), columns = a.shape, b.shape[0]
    kernel = triton.jit(function)
    c = torch.full((rows * columns + 2 * GUARD,), UNTOUCHED)
    grid = (triton.cdiv(rows, block), triton.cdiv(columns, block))
    kernel[grid](guarded(a, around), guarded(b, around), c[GUARD:], scale, rows, columns, depth, BLOCK=block)
    return c


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
        unsolved = isinstance(error, NotImplementedError)
        found = "unsolved" if unsolved else f"{Path(path).name}: {place(error, path)}{type(error).__name__}: {error}"
    torch.save(found, results)


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
