"""Wrong attempts at lesson 15, and what their message must say."""

from types import SimpleNamespace

import torch

from lessons.checking import wrong_attempt

try:
    import triton.language as tl
except ImportError:  # Triton is for Linux; without it the kernel cannot be run, and the check says so
    tl = SimpleNamespace(constexpr=int)


def _rounded(x, round=torch.round, smallest=-6, bits=3, limit=448.0):
    step = torch.ldexp(torch.ones_like(x), (torch.frexp(x).exponent - 1).clamp(min=smallest) - bits)
    return (round(x / step) * step).clamp(-limit, limit)


@wrong_attempt("round_e4m3", says="cut off, not rounded")
def cut_off(x):
    return _rounded(x, torch.trunc)


@wrong_attempt("round_e4m3", says="subnormal numbers")
def no_subnormals(x):
    return _rounded(x, smallest=-100)


@wrong_attempt("round_e4m3", says="subnormal numbers are missing")
def flushed(x):
    return torch.where(x.abs() < 2.0**-6, 0.0, _rounded(x))


@wrong_attempt("round_e4m3", says="clamp")
def unlimited(x):
    return _rounded(x, limit=1e9)


@wrong_attempt("round_e4m3", says="that is e5m2")
def e5m2(x):
    return _rounded(x, bits=2, smallest=-14)


@wrong_attempt("round_e4m3", says="halves go to the even multiple")
def halves_up(x):
    return _rounded(x, lambda count: torch.floor(count + 0.5))


@wrong_attempt("delayed_scales", says="That is the current scale")
def always_current(largest, headroom, bootstrap):
    return [now / 448 for now in largest]


@wrong_attempt("delayed_scales", says="The headroom is missing")
def no_headroom(largest, headroom, bootstrap):
    return [largest[i if i < max(bootstrap, 1) else i - 1] / 448 for i in range(len(largest))]


@wrong_attempt("delayed_scales", says="still bootstraps")
def no_bootstrap(largest, headroom, bootstrap):
    return [now / 448 if i == 0 else largest[i - 1] * headroom / 448 for i, now in enumerate(largest)]


@wrong_attempt("delayed_scales", says="needs no headroom")
def headroom_always(largest, headroom, bootstrap):
    return [largest[i if i < max(bootstrap, 1) else i - 1] * headroom / 448 for i in range(len(largest))]


def _eight(x, scale):
    return (x / scale).to(torch.float8_e4m3fn).float()


@wrong_attempt("fp8_linear", says="Nothing has been scaled")
def unscaled(x, weight):
    return _eight(x, 1.0) @ _eight(weight, 1.0).T


@wrong_attempt("fp8_linear", says="Only the weight's scale")
def one_scale_back(x, weight):
    s, t = x.abs().max() / 448, weight.abs().max() / 448
    return _eight(x, s) @ _eight(weight, t).T * t


@wrong_attempt("fp8_linear", says="nothing has been rounded")
def in_float(x, weight):
    return x @ weight.T


@wrong_attempt("fp8_linear", says="0 / 0")
def zeros_by_zero(x, weight):
    s, t = x.abs().max() / 448, weight.abs().max() / 448
    return _eight(x, s) @ _eight(weight, t).T * s * t


@wrong_attempt("product_bytes", says="every operand once")
def read_once(rows, columns, depth, tile_rows, tile_columns, element):
    return (rows + columns) * depth * element + 2 * rows * columns


@wrong_attempt("product_bytes", says="without tiles")
def no_tiles(rows, columns, depth, tile_rows, tile_columns, element):
    return rows * columns * 2 * depth * element + 2 * rows * columns


@wrong_attempt("product_bytes", says="The result is missing")
def no_result(rows, columns, depth, tile_rows, tile_columns, element):
    return (rows // tile_rows) * (columns // tile_columns) * (tile_rows + tile_columns) * depth * element


@wrong_attempt("product_kernel", says="you read beyond them")
def no_mask_on_depth(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        tile_a = tl.load(a + i[:, None] * depth + k[None, :], mask=i[:, None] < rows, other=0.0)
        tile_b = tl.load(b + j[None, :] * depth + k[:, None], mask=j[None, :] < columns, other=0.0)
        total = tl.dot(tile_a, tile_b, total)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(c + i[:, None] * columns + j[None, :], total * scale, mask=inside)


@wrong_attempt("product_kernel", says="you write beyond the result")
def no_mask_on_the_result(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask_a = (i[:, None] < rows) & (k[None, :] < depth)
        mask_b = (j[None, :] < columns) & (k[:, None] < depth)
        tile_a = tl.load(a + i[:, None] * depth + k[None, :], mask=mask_a, other=0.0)
        tile_b = tl.load(b + j[None, :] * depth + k[:, None], mask=mask_b, other=0.0)
        total = tl.dot(tile_a, tile_b, total)
    tl.store(c + i[:, None] * columns + j[None, :], total * scale)


@wrong_attempt("product_kernel", says="loop over depth")
def first_piece_only(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK)
    mask_a = (i[:, None] < rows) & (k[None, :] < depth)
    mask_b = (j[None, :] < columns) & (k[:, None] < depth)
    tile_a = tl.load(a + i[:, None] * depth + k[None, :], mask=mask_a, other=0.0)
    tile_b = tl.load(b + j[None, :] * depth + k[:, None], mask=mask_b, other=0.0)
    total = tl.dot(tile_a, tile_b)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(c + i[:, None] * columns + j[None, :], total * scale, mask=inside)


@wrong_attempt("product_kernel", says="the scale is missing")
def never_scaled(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask_a = (i[:, None] < rows) & (k[None, :] < depth)
        mask_b = (j[None, :] < columns) & (k[:, None] < depth)
        tile_a = tl.load(a + i[:, None] * depth + k[None, :], mask=mask_a, other=0.0)
        tile_b = tl.load(b + j[None, :] * depth + k[:, None], mask=mask_b, other=0.0)
        total = tl.dot(tile_a, tile_b, total)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(c + i[:, None] * columns + j[None, :], total, mask=inside)


@wrong_attempt("round_e4m3", says="Round by yourself")
def by_torchs_dtype(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


@wrong_attempt("delayed_scales", says="largest[-1] is the last one's")
def nothing_before_the_first(largest, headroom, bootstrap):
    return [(now if i < bootstrap else largest[i - 1] * headroom) / 448 for i, now in enumerate(largest)]


@wrong_attempt("delayed_scales", says="of all passes so far")
def running_maximum(largest, headroom, bootstrap):
    current = max(bootstrap, 1)
    return [(now if i < current else max(largest[:i]) * headroom) / 448 for i, now in enumerate(largest)]


def _current(x, least=1e-30):
    return (x.abs().amax() / 448).clamp(min=least)


@wrong_attempt("fp8_linear", says="weights all zeros")
def zero_weights(x, weight):
    s, t = _current(x), weight.abs().amax() / 448
    return _eight(x, s) @ _eight(weight, t).T * s * t


@wrong_attempt("fp8_linear", says="weights around 0.00001")
def a_large_clamp(x, weight):
    s, t = (each.abs().amax().clamp(min=1e-3) / 448 for each in (x, weight))
    return _eight(x, s) @ _eight(weight, t).T * s * t


@wrong_attempt("fp8_linear", says="Your function has changed `x`")
def divided_in_place(x, weight):
    s, t = _current(x), _current(weight)
    x /= s
    return _eight(x, 1.0) @ _eight(weight, t).T * s * t


@wrong_attempt("fp8_linear", says="float64; float32 is asked for")
def in_float64(x, weight):
    s, t = _current(x), _current(weight)
    return _eight(x, s).double() @ _eight(weight, t).double().T * s * t


@wrong_attempt("fp8_linear", says="bfloat16; float32 is asked for")
def in_bfloat16(x, weight):
    s, t = _current(x), _current(weight)
    return (_eight(x, s) @ _eight(weight, t).T * s * t).bfloat16()


@wrong_attempt("fp8_linear", says="scale for every row of x; one scale a tensor")
def a_scale_per_row(x, weight):
    s, t = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-30), _current(weight)
    return _eight(x, s) @ _eight(weight, t).T * s * t


@wrong_attempt("fp8_linear", says="Is the product in float32")
def product_in_eight_bits(x, weight):
    s, t = _current(x), _current(weight)
    product = _eight(x, s) @ _eight(weight, t).T / 1000
    return product.clamp(-448, 448).to(torch.float8_e4m3fn).float() * s * t


@wrong_attempt("product_bytes", says="Rows and columns are exchanged")
def mixed_up(rows, columns, depth, tile_rows, tile_columns, element):
    read = rows // tile_rows * rows * depth * element + columns // tile_columns * columns * depth * element
    return read + 2 * rows * columns


@wrong_attempt("product_bytes", says="The result is in bfloat16")
def result_in_float32(rows, columns, depth, tile_rows, tile_columns, element):
    tiles = (rows // tile_rows) * (columns // tile_columns)
    return tiles * (tile_rows + tile_columns) * depth * element + 4 * rows * columns


@wrong_attempt("product_kernel", says="the result depends on what lies behind A or B")
def no_mask_over_depth_on_b(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask_a = (i[:, None] < rows) & (k[None, :] < depth)
        mask_b = (j[None, :] < columns) & (k[:, None] >= 0)
        tile_a = tl.load(a + i[:, None] * depth + k[None, :], mask=mask_a, other=0.0)
        tile_b = tl.load(b + j[None, :] * depth + k[:, None], mask=mask_b, other=0.0)
        total = tl.dot(tile_a, tile_b, total)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(c + i[:, None] * columns + j[None, :], total * scale, mask=inside)


@wrong_attempt("product_kernel", says="on a GPU that is an illegal access")
def no_masks_on_rows(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask_a = (i[:, None] >= 0) & (k[None, :] < depth)
        mask_b = (j[None, :] >= 0) & (k[:, None] < depth)
        tile_a = tl.load(a + i[:, None] * depth + k[None, :], mask=mask_a, other=0.0)
        tile_b = tl.load(b + j[None, :] * depth + k[:, None], mask=mask_b, other=0.0)
        total = tl.dot(tile_a, tile_b, total)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(c + i[:, None] * columns + j[None, :], total * scale, mask=inside)


@wrong_attempt("product_kernel", says="away from A: on a GPU that is an illegal access")
def multiplied_by_block_twice(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask_a = (i[:, None] < rows) & (k[None, :] < depth)
        mask_b = (j[None, :] < columns) & (k[:, None] < depth)
        tile_a = tl.load(a + i[:, None] * BLOCK * depth + k[None, :], mask=mask_a, other=0.0)
        tile_b = tl.load(b + j[None, :] * depth + k[:, None], mask=mask_b, other=0.0)
        total = tl.dot(tile_a, tile_b, total)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(c + i[:, None] * columns + j[None, :], total * scale, mask=inside)


@wrong_attempt("product_kernel", says="Give it other=0.0")
def without_other(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask_a = (i[:, None] < rows) & (k[None, :] < depth)
        mask_b = (j[None, :] < columns) & (k[:, None] < depth)
        tile_a = tl.load(a + i[:, None] * depth + k[None, :], mask=mask_a)
        tile_b = tl.load(b + j[None, :] * depth + k[:, None], mask=mask_b, other=0.0)
        total = tl.dot(tile_a, tile_b, total)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(c + i[:, None] * columns + j[None, :], total * scale, mask=inside)


@wrong_attempt("fp8_linear", says="Does the largest magnitude become 448")
def half_the_range(x, weight):
    x_scale, w_scale = 2 * _current(x), 2 * _current(weight)
    return _eight(x, x_scale) @ _eight(weight, w_scale).T * (x_scale * w_scale)


@wrong_attempt("product_kernel", says="were never written")
def tiles_of_thirty_two(a, b, c, scale, rows, columns, depth, BLOCK: tl.constexpr):
    i = tl.program_id(0) * 32 + tl.arange(0, 32)
    j = tl.program_id(1) * 32 + tl.arange(0, 32)
    total = tl.zeros((32, 32), tl.float32)
    for start in range(0, depth, 32):
        k = start + tl.arange(0, 32)
        mask_a = (i[:, None] < rows) & (k[None, :] < depth)
        mask_b = (j[None, :] < columns) & (k[:, None] < depth)
        tile_a = tl.load(a + i[:, None] * depth + k[None, :], mask=mask_a, other=0.0)
        tile_b = tl.load(b + j[None, :] * depth + k[:, None], mask=mask_b, other=0.0)
        total = tl.dot(tile_a, tile_b, total)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(c + i[:, None] * columns + j[None, :], total * scale, mask=inside)
