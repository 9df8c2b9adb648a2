"""The product that every matrix kernel here is made of: a tile of A·Bᵀ, from rows of A and rows of B.

Both operands lie with the summed dimension last. That is how a linear layer's input and weight lie anyway, it is the
only way in which a Hopper GPU multiplies 8-bit numbers, and X·Xᵀ is the case A = B.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from speedrun.kernels import INTERPRETED


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: a program computes m × n of the result, k of the sum at a time.

    warps: groups of 32 threads in a program (4 make the unit that issues a Hopper matrix instruction); stages: tiles of
    the operands in flight between memory and the multiplication.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    together: int = 8
    """Rows of tiles that are taken side by side, so that programs that run at once share operands in the L2 cache."""

    def of(self, operand: Tensor) -> "Tiles":
        """These, or smaller ones for float32 operands, which would not fit beside each other."""
        return FLOAT32 if operand.dtype == torch.float32 else self

    def arguments(self, operand: Tensor) -> dict[str, object]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "WIDEN": INTERPRETED and operand.dtype == torch.bfloat16,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def count(self, rows: int, columns: int) -> int:
        """Programs for a result of this shape."""
        return triton.cdiv(rows, self.m) * triton.cdiv(columns, self.n)


FLOAT32 = Tiles(m=64, n=64, k=32, warps=4, stages=2)
"""For exactness, not for speed: no matrix unit multiplies float32 as such."""


@triton.jit
def first_of_tile(program, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr):
    """Program → (first row, first column) of its tile: down TOGETHER tiles, then one column of tiles on."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = program // (TOGETHER * across) * TOGETHER
    height = tl.minimum(down - first, TOGETHER)
    inside = program % (TOGETHER * across)
    return (first + inside % height) * BLOCK_M, (inside // height) * BLOCK_N


@triton.jit
def tile_of_product(
    a,
    stride_a,
    stride_a_k,
    rows,
    row,
    b,
    stride_b,
    stride_b_k,
    columns,
    column,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    SHORT_SUMS: tl.constexpr = False,
):
    """Σ_k A[i, k]·B[j, k] in float32 for BLOCK_M rows of A from `row` and BLOCK_N rows of B from `column`.

    a, b: pointers, with strides in elements; rows, columns, depth: A is rows × depth, B columns × depth. What lies
    outside counts as zero. WIDEN: multiply in float32, because the interpreter takes bfloat16 for integers. SHORT_SUMS:
    8-bit products are added up in the matrix unit, which keeps about 14 bits, over BLOCK_K terms at most, and in
    float32 from there; without it over all of them. Float32 operands are multiplied as such, not rounded to TF32.
    """
    i = row + tl.arange(0, BLOCK_M)
    j = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at_a = a + i[:, None].to(tl.int64) * stride_a + k[None, :] * stride_a_k
    at_b = b + j[None, :].to(tl.int64) * stride_b + k[:, None] * stride_b_k
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = depth - start
        tile_a = tl.load(at_a, mask=(i[:, None] < rows) & (k[None, :] < left), other=0.0)
        tile_b = tl.load(at_b, mask=(j[None, :] < columns) & (k[:, None] < left), other=0.0)
        if WIDEN:
            tile_a = tile_a.to(tl.float32)
            tile_b = tile_b.to(tl.float32)
        if SHORT_SUMS:
            total += tl.dot(tile_a, tile_b)
        else:
            total = tl.dot(tile_a, tile_b, total, input_precision="ieee")
        at_a += BLOCK_K * stride_a_k
        at_b += BLOCK_K * stride_b_k
    return total
