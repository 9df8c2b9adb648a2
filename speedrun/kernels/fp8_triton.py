"""The Triton kernels of fp8.py: the largest magnitude, quantisation, the product.

Lesson 15's, and for comparison: no run on a GPU takes them (`fp8.way`). What was wrong with them on an H100, and why,
stands in tests/kernels/checks/__init__.py; as they are now they have not been seen on a GPU.

Triton's interpreter is no model of the hardware in three things: where the hardware rounds to nearest on its way to FP8
it cuts off or (Triton 3.9) loses the carry into the exponent, it cuts off on the way to bfloat16, and it has no NaN in
e4m3. With a current scale NaN passes all the same: the scale is NaN then, and with it every result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.kernels.fp8_formats import LARGEST, SMALLEST_SCALE, Quantized, transposed
from speedrun.kernels.tiles import Tiles, first_of_tile, tile_of_product

TILES = Tiles(m=128, n=256, k=128, warps=8, stages=4)
EXACT_TILES = Tiles(m=128, n=128, k=128, warps=8, stages=4)
"""With float32 sums a program holds two tiles of results: the matrix unit's, of 128 terms, and their sum."""
BLOCK = 64
"""Quantisation goes by squares of this side."""


@triton.jit
def tile_of_rows(x, stride_row, stride_column, rows, columns, BLOCK: tl.constexpr):
    """The BLOCK × BLOCK tile of this program in float32 (zero outside), its rows [:, None] and columns [None, :]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = x + i.to(tl.int64) * stride_row + j.to(tl.int64) * stride_column
    return tl.load(at, mask=(i < rows) & (j < columns), other=0.0).to(tl.float32), i, j


@triton.jit
def raise_largest(largest, tile):
    """largest[0] ← max(largest[0], |tile|), both as the integers whose bits these floats are.

    For magnitudes the two orders are the same, and NaN is above all numbers: it is not lost as in a floating maximum.
    """
    tl.atomic_max(largest, tl.max(tl.max(tl.abs(tile).to(tl.int32, bitcast=True), 1), 0), sem="relaxed")


@triton.jit
def largest_kernel(
    x, largest, state, stride_row, stride_column, rows, columns, BOOTSTRAP: tl.constexpr, BLOCK: tl.constexpr
):
    """largest[0], int32 that starts at zero ← the bits of max |x|. Nothing to do once state[1] ≥ BOOTSTRAP > 0."""
    if BOOTSTRAP > 0:
        if tl.load(state + 1) >= BOOTSTRAP:
            return
    tile, _, _ = tile_of_rows(x, stride_row, stride_column, rows, columns, BLOCK)
    raise_largest(largest, tile)


@triton.jit
def quantize_kernel(
    x,
    q,
    scale,
    current,
    largest,
    state,
    fixed,
    stride_row,
    stride_column,
    rows,
    columns,
    headroom,
    LIMIT: tl.constexpr,
    SMALLEST: tl.constexpr,
    FIXED: tl.constexpr,
    BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """q = x / s, saturated at ±LIMIT, and scale[0] = s.

    s is `fixed` with FIXED, else from `current`, the largest magnitude as `largest_kernel` leaves it, or with BOOTSTRAP
    > 0 and as many passes in state[1] from state[0]; then also largest[0] ← the bits of max |x|, for the next pass.
    q is contiguous.
    """
    if FIXED:
        s = fixed
    else:
        magnitude = tl.load(current).to(tl.float32, bitcast=True)
        if BOOTSTRAP > 0:
            magnitude = tl.where(tl.load(state + 1) < BOOTSTRAP, magnitude, tl.load(state) * headroom)
        s = tl.div_rn(magnitude, LIMIT)
        s = tl.where(s < SMALLEST, SMALLEST, s)  # unlike maximum, lets NaN through
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale, s)
    tile, i, j = tile_of_rows(x, stride_row, stride_column, rows, columns, BLOCK)
    if BOOTSTRAP > 0:
        raise_largest(largest, tile)
    tile = tile * tl.div_rn(1.0, s)
    tile = tl.where(tile > LIMIT, LIMIT, tl.where(tile < -LIMIT, -LIMIT, tile))
    tl.store(q + i.to(tl.int64) * columns + j, tile.to(q.dtype.element_ty), mask=(i < rows) & (j < columns))


@triton.jit
def fp8_product_kernel(
    a,
    b,
    result,
    scale_a,
    scale_b,
    stride_a,
    stride_b,
    rows,
    columns,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    TOGETHER: tl.constexpr,
    EXACT: tl.constexpr,
    SQUARE: tl.constexpr,
):
    """result = A·Bᵀ·scale_a·scale_b, with SQUARE relu(that)². a, b: unit stride along the sum; result contiguous."""
    row, column = first_of_tile(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, TOGETHER)
    tile = tile_of_product(
        a, stride_a, 1, rows, row, b, stride_b, 1, columns, column, depth,
        BLOCK_M, BLOCK_N, BLOCK_K, WIDEN, EXACT,
    )  # fmt: skip
    tile = tile * tl.load(scale_a) * tl.load(scale_b)
    if SQUARE:
        tile = tl.where(tile < 0, 0.0, tile)
        tile = tile * tile
    i = row + tl.arange(0, BLOCK_M)[:, None]
    j = column + tl.arange(0, BLOCK_N)[None, :]
    at = result + i.to(tl.int64) * columns + j
    tl.store(at, tile.to(result.dtype.element_ty), mask=(i < rows) & (j < columns))


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    transpose: bool,
    fixed: float,
    state: Tensor | None = None,
    headroom: float = 1.0,
    bootstrap: int = 0,
) -> Quantized:
    """See fp8.quantize and, with a state, fp8.quantize_delayed.

    The transpose is torch's copy, not the kernel's: where it took converted pairs of bytes apart again, ptxas 12.8
    (Triton 3.6) lost some of them.
    """
    rows, columns = x.shape
    q = torch.empty((rows, columns), dtype=dtype, device=x.device)
    scale = torch.empty((), device=x.device)
    bits = torch.zeros(2, dtype=torch.int32, device=x.device)  # this pass's magnitude for itself, and for the next
    if state is None:
        state = scale  # not read
    grid = (triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK))
    if not fixed:
        largest_kernel[grid](x, bits, state, *x.stride(), rows, columns, BOOTSTRAP=bootstrap, BLOCK=BLOCK)
    quantize_kernel[grid](
        x, q, scale, bits, bits[1:], state, fixed, *x.stride(), rows, columns, headroom,
        LIMIT=LARGEST[dtype], SMALLEST=SMALLEST_SCALE, FIXED=fixed != 0, BOOTSTRAP=bootstrap, BLOCK=BLOCK,
    )  # fmt: skip
    if bootstrap:
        state[0].copy_(bits[1:].view(torch.float32)[0])
        state[1].add_(1)
    return q, transposed(q, transpose), scale


def product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, exact: bool, square: bool
) -> Tensor:
    """See fp8.product; `square` squares the ReLU of the result. a, b: unit stride along the second dimension."""
    (rows, depth), columns = a.shape, b.shape[0]
    result = torch.empty((rows, columns), dtype=dtype, device=a.device)
    tiles = EXACT_TILES if exact else TILES
    fp8_product_kernel[(tiles.count(rows, columns),)](
        a, b, result, scale_a, scale_b, a.stride(0), b.stride(0), rows, columns, depth,
        TOGETHER=tiles.together, EXACT=exact, SQUARE=square, **tiles.arguments(a),
    )  # fmt: skip
    return result
