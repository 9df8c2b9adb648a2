"""X·Xᵀ and b·A + c·A² for orthogonalisation: symmetric results, so half of the tiles are computed and mirrored.

The results are symmetric to the bit: below the diagonal, also inside a tile, lies a copy of what is above it.

Half of the arithmetic is not half of the time: on an H100 the polynomial took 0.69 of torch.baddbmm's, but X·Xᵀ 1.04 to
1.12 times torch.bmm's (measured.py), so that a run takes only the polynomial from here.

Both are products of a matrix with its own transpose (A² = A·Aᵀ for a symmetric A), so one kernel serves. The rest of a
Newton–Schulz or Polar Express iteration, (b·A + c·A²)·X, has no such symmetry and stays with torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.kernels.tiles import Tiles, tile_of_product

TILES = Tiles(m=128, n=128, k=64, warps=8, stages=4)


def gram_reference(x: Tensor) -> Tensor:
    """X·Xᵀ of matrices [n, rows, columns] → [n, rows, rows]."""
    return x @ x.mT


def polynomial_reference(a: Tensor, b: float, c: float) -> Tensor:
    """b·A + c·A² of symmetric matrices [n, rows, rows]."""
    return b * a + c * (a @ a)


@triton.jit
def symmetric_kernel(
    x,
    result,
    stride_matrix,
    stride_row,
    stride_column,
    rows,
    columns,
    b,
    c,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
):
    """result = X·Xᵀ, or b·X + c·X·Xᵀ with POLYNOMIAL, where X has to be symmetric. Tiles are square.

    One program per tile and matrix: program_id(0), (1) are the tile's row and column, (2) is the matrix. Programs below
    the diagonal have nothing to do: their tile is written by the one above, turned over. `result` is contiguous.
    """
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    if row > column:
        return
    matrix = tl.program_id(2).to(tl.int64)
    x += matrix * stride_matrix
    result += matrix * rows * rows
    tile = tile_of_product(
        x, stride_row, stride_column, rows, row, x, stride_row, stride_column, rows, column, columns,
        BLOCK_M, BLOCK_N, BLOCK_K, WIDEN,
    )  # fmt: skip
    i = row + tl.arange(0, BLOCK_M)[:, None]
    j = column + tl.arange(0, BLOCK_N)[None, :]
    inside = (i < rows) & (j < rows)
    if POLYNOMIAL:
        here = tl.load(x + i.to(tl.int64) * stride_row + j * stride_column, mask=inside, other=0.0)
        tile = b * here.to(tl.float32) + c * tile
    tile = tile.to(result.dtype.element_ty)
    # Every number from the diagonal up is written in both its places, also inside a tile on the diagonal: Σ x·y and
    # Σ y·x need not be added up in the same order.
    tl.store(result + i.to(tl.int64) * rows + j, tile, mask=inside & (i <= j))
    # Turned over, so that neighbouring threads write to neighbouring places of the lower triangle, too.
    i = column + tl.arange(0, BLOCK_N)[:, None]
    j = row + tl.arange(0, BLOCK_M)[None, :]
    tl.store(result + i.to(tl.int64) * rows + j, tl.trans(tile), mask=(i < rows) & (j < rows) & (i > j))


def _launch(x: Tensor, b: float, c: float, polynomial: bool) -> Tensor:
    matrices, rows, columns = x.shape
    result = torch.empty((matrices, rows, rows), dtype=x.dtype, device=x.device)
    if result.numel():
        tiles = TILES.of(x)
        side = triton.cdiv(rows, tiles.m)
        symmetric_kernel[(side, side, matrices)](
            x, result, *x.stride(), rows, columns, b, c, POLYNOMIAL=polynomial, **tiles.arguments(x)
        )
    return result


@torch.library.custom_op("speedrun::gram", mutates_args=())
def gram(x: Tensor) -> Tensor:
    """X·Xᵀ of matrices [n, rows, columns], of any strides, in their dtype; sums in float32. Give x.mT for Xᵀ·X."""
    return _launch(x, 0.0, 1.0, polynomial=False)


@torch.library.custom_op("speedrun::symmetric_polynomial", mutates_args=())
def polynomial(a: Tensor, b: float, c: float) -> Tensor:
    """b·A + c·A² of symmetric matrices [n, rows, rows], in their dtype; sums in float32. Symmetry is not checked."""
    return _launch(a, b, c, polynomial=True)


@gram.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], x.shape[1]))


@polynomial.register_fake
def _(a: Tensor, b: float, c: float) -> Tensor:
    return a.new_empty(a.shape)


def _gram_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def _gram_backward(ctx, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return (gradient + gradient.mT) @ x


def _polynomial_context(ctx, inputs, output) -> None:
    a, ctx.b, ctx.c = inputs
    ctx.save_for_backward(a)


def _polynomial_backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
    (a,) = ctx.saved_tensors
    return ctx.b * gradient + ctx.c * (gradient @ a.mT + a.mT @ gradient), None, None


gram.register_autograd(_gram_backward, setup_context=_gram_context)
polynomial.register_autograd(_polynomial_backward, setup_context=_polynomial_context)
