"""Other right solutions of lesson 15, differently built: the check must pass them."""

from types import SimpleNamespace

import torch

from lessons.checking import right_attempt

try:
    import triton.language as tl
except ImportError:  # Triton is for Linux; without it the kernel cannot be run, and the check says so
    tl = SimpleNamespace(constexpr=int)


@right_attempt("round_e4m3")
def by_table(x):
    """All numbers of the format written out; the nearest, of two the even one."""
    numbers = [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0**e for e in range(-9, 6) for m in range(8)]
    table = torch.tensor(numbers[:127], dtype=torch.float64)
    size = x.double().abs().clamp(max=448.0)
    above = torch.searchsorted(table, size.contiguous()).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - size, size - table[below]
    nearest = torch.where((up < down) | ((up == down) & (above % 2 == 0)), table[above], table[below])
    return (nearest * x.double().sign()).float()


@right_attempt("delayed_scales")
def by_shifting(largest, headroom, bootstrap):
    scales = []
    for before, now in zip([None, *largest], largest, strict=False):
        current = before is None or len(scales) < bootstrap
        scales.append(now / 448 if current else before / 448 * headroom)
    return scales


@right_attempt("fp8_linear")
def scales_by_where(x, weight):
    found = torch.ones((), dtype=torch.float32)
    parts = []
    for each in (x, weight):
        largest = torch.linalg.vector_norm(each, float("inf"))
        scale = torch.where(largest == 0, 1.0, largest / 448.0)
        parts.append((each * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32))
        found = found * scale
    return torch.nn.functional.linear(*parts) * found


@right_attempt("product_kernel")
def transposed_tile(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask_a = (i[:, None] < rows) & (k[None, :] < depth)
        mask_b = (j[:, None] < columns) & (k[None, :] < depth)
        tile_a = tl.load(a + i[:, None] * depth + k[None, :], mask=mask_a, other=0.0)
        tile_b = tl.load(b + j[:, None] * depth + k[None, :], mask=mask_b, other=0.0)
        total += tl.dot(tile_a, tl.trans(tile_b)) * scale
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(c + i[:, None] * columns + j[None, :], total, mask=inside)
