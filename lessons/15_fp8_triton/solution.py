"""Lesson 15, FP8 and Triton: one way to solve the exercises."""

from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton.language as tl
except ImportError:  # Triton is for Linux; without it the kernel cannot be run, and the check says so
    tl = SimpleNamespace(constexpr=int)


def round_e4m3(x: Tensor) -> Tensor:
    """Find the spacing where x lies, and count in it."""
    exponent = torch.frexp(x).exponent - 1  # frexp's mantissa is in [0.5, 1)
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-6) - 3)
    return (torch.round(x / step) * step).clamp(-448, 448)


def delayed_scales(largest: list[float], headroom: float, bootstrap: int) -> list[float]:
    """What came before, times the headroom; at first, what is there."""
    return [(now if i < bootstrap or i == 0 else largest[i - 1] * headroom) / 448.0 for i, now in enumerate(largest)]


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Both scales come back after the product."""
    x_scale, w_scale = _current_scale(x), _current_scale(weight)
    x8, w8 = (x / x_scale).to(torch.float8_e4m3fn), (weight / w_scale).to(torch.float8_e4m3fn)
    return x8.float() @ w8.float().T * (x_scale * w_scale)


def _current_scale(x: Tensor) -> Tensor:
    """The largest magnitude becomes 448; a tensor of zeros is divided by something, too."""
    return (x.abs().max() / 448.0).clamp(min=1e-30)


def product_bytes(rows: int, columns: int, depth: int, tile_rows: int, tile_columns: int, element: int) -> int:
    """Each tile reads its own rows of A and of B."""
    tiles = (rows // tile_rows) * (columns // tile_columns)
    return tiles * (tile_rows + tile_columns) * depth * element + rows * columns * 2


def product_kernel(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    """Rows of A, rows of B, a piece of the sum at a time; the scale once, at the end."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        tile_a = tl.load(
            a + i[:, None] * depth + k[None, :], mask=(i[:, None] < rows) & (k[None, :] < depth), other=0.0
        )
        tile_b = tl.load(
            b + j[None, :] * depth + k[:, None], mask=(j[None, :] < columns) & (k[:, None] < depth), other=0.0
        )
        total = tl.dot(tile_a, tile_b, total)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(c + i[:, None] * columns + j[None, :], total * scale, mask=inside)
