"""Lesson 15, FP8 and Triton. Write the five functions; `shardrun lesson check 15` says what is right."""

from types import SimpleNamespace

import torch  # noqa: F401
from torch import Tensor

try:
    import triton.language as tl  # noqa: F401
except ImportError:  # Triton is for Linux; without it the kernel cannot be run, and the check says so
    tl = SimpleNamespace(constexpr=int)


def round_e4m3(x: Tensor) -> Tensor:
    """x (float32, any shape) rounded to the nearest number of e4m3, in float32, without any 8-bit dtype of torch.

    Numbers of e4m3 are multiples of 2^(e − 3), where 2^e ≤ |x| < 2^(e + 1), and of 2^−9 below 2^−6. Halves go to the
    even multiple, as torch.round does it. The largest is 448: numbers above 448 become 448, numbers below −448 become
    −448.
    """
    raise NotImplementedError


def delayed_scales(largest: list[float], headroom: float, bootstrap: int) -> list[float]:
    """The scale that each pass divides its tensor by, for e4m3.

    largest: the largest magnitude of the tensor in each pass. The first `bootstrap` passes use the current scale: the
    tensor's own largest magnitude becomes 448. So does pass 0 always, as there is no pass before it. Later ones use the
    delayed scale: the largest magnitude of the pass before, times headroom, becomes 448. (So nobody has to look at
    a tensor before it is quantised.)
    """
    raise NotImplementedError


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ by way of FP8: both quantised to torch.float8_e4m3fn with their current scales.

    x: float32 [rows, in]; weight: float32 [out, in]; one scale a tensor. Returns float32 [rows, out]. The product of
    the quantised matrices may be computed in float32 (that is what the reference does; a GPU multiplies 8 bits
    and adds up in more).
    """
    raise NotImplementedError


def product_bytes(rows: int, columns: int, depth: int, tile_rows: int, tile_columns: int, element: int) -> int:
    """Bytes that a tiled product A · Bᵀ reads and writes in the GPU's memory, if caches help nothing.

    A is rows × depth, B columns × depth, with `element` bytes each. One program per tile of the result: it reads
    the rows of A and of B that its tile needs, once, and writes its tile in bfloat16. Tiles divide everything.
    """
    raise NotImplementedError


def product_kernel(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    """A Triton kernel: c = A · Bᵀ · scale, run in Triton's interpreter on ⌈rows/BLOCK⌉ × ⌈columns/BLOCK⌉ programs.

    a, b, c: pointers to A [rows, depth] and B [columns, depth] in float8_e4m3fn and to the result [rows, columns] in
    float32, all contiguous; scale: a float. The program (tl.program_id(0), tl.program_id(1)) computes the tile of
    BLOCK × BLOCK there, BLOCK terms of the sum at a time (tl.dot, in float32). Nothing divides by BLOCK: masks,
    so that nothing is read or written outside of the matrices.
    """
    raise NotImplementedError
