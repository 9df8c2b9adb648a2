"""relu(x·Wᵀ)² in one kernel: the product's tile is squared while it is still in registers.

This is for memory. It is as fast as the same formula under torch.compile (0.99 on an H100, measured.py) and no faster.
But without torch.compile the MLP's hidden activations are written, read, squared and written again, and backward keeps
both. Here only the result y is kept, which the next layer keeps anyway (in bf16, tokens × mlp_width × 2 bytes a layer
less): backward needs relu(x·Wᵀ) = √y, and a rounding error of y halves under the root. The price: a pre-activation
below 1e-19, whose square is no float any more, gets gradient zero, and one above 1e19 gets an infinite one.

Backward: with u = 2·√y·g, one kernel, dx = u·W and dW = uᵀ·x are torch's products.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from speedrun.kernels import compute_dtype
from speedrun.kernels.tiles import Tiles, first_of_tile, tile_of_product

TILES = Tiles(m=128, n=256, k=64, warps=8, stages=4)
BLOCK = 4096


def linear_relu2_reference(x: Tensor, weight: Tensor) -> Tensor:
    """relu(x·Wᵀ)², x [..., in], weight [out, in] → [..., out]."""
    return F.relu(F.linear(x, weight)).square()


def linear_relu2(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference, in the dtype of matrix products (autocast's, inside autocast)."""
    dtype = compute_dtype(x)
    y = linear_relu2_rows(x.to(dtype).flatten(0, -2), weight.to(dtype))
    return y.unflatten(0, x.shape[:-1])


@triton.jit
def linear_relu2_kernel(
    x,
    weight,
    y,
    stride_x,
    stride_x_k,
    stride_w,
    stride_w_k,
    rows,
    columns,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """y = relu(x·Wᵀ)²: x rows × depth, weight columns × depth, y contiguous rows × columns."""
    row, column = first_of_tile(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, TOGETHER)
    tile = tile_of_product(
        x, stride_x, stride_x_k, rows, row, weight, stride_w, stride_w_k, columns, column, depth,
        BLOCK_M, BLOCK_N, BLOCK_K, WIDEN,
    )  # fmt: skip
    tile = tl.where(tile < 0, 0.0, tile)  # unlike maximum, lets NaN through
    i = row + tl.arange(0, BLOCK_M)[:, None]
    j = column + tl.arange(0, BLOCK_N)[None, :]
    at = y + i.to(tl.int64) * columns + j
    tl.store(at, (tile * tile).to(y.dtype.element_ty), mask=(i < rows) & (j < columns))


@triton.jit
def relu2_backward_kernel(y, gradient, u, elements, BLOCK: tl.constexpr):
    """u = 2·√y·gradient, and zero where y is, all of them contiguous."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    result = tl.where(value <= 0, 0.0, 2.0 * tl.sqrt(value) * g)
    tl.store(u + at, result.to(u.dtype.element_ty), mask=inside)


@torch.library.custom_op("speedrun::linear_relu2", mutates_args=())
def linear_relu2_rows(x: Tensor, weight: Tensor) -> Tensor:
    """relu(x·Wᵀ)² for x [rows, in] and weight [out, in] of one dtype and any strides → contiguous [rows, out]."""
    (rows, depth), columns = x.shape, weight.shape[0]
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if y.numel():
        tiles = TILES.of(x)
        linear_relu2_kernel[(tiles.count(rows, columns),)](
            x, weight, y, *x.stride(), *weight.stride(), rows, columns, depth,
            TOGETHER=tiles.together, **tiles.arguments(x),
        )  # fmt: skip
    return y


@torch.library.custom_op("speedrun::relu2_backward", mutates_args=())
def relu2_backward(y: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of p where y = relu(p)²: 2·√y·gradient. y: contiguous; gradient: of its shape."""
    gradient = gradient.contiguous()
    u = torch.empty_like(y)
    if u.numel():
        relu2_backward_kernel[(triton.cdiv(u.numel(), BLOCK),)](y, gradient, u, u.numel(), BLOCK=BLOCK)
    return u


@linear_relu2_rows.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@relu2_backward.register_fake
def _(y: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(y)


def _context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, y = ctx.saved_tensors
    u = relu2_backward(y, gradient)
    return u @ weight, u.mT @ x


linear_relu2_rows.register_autograd(_backward, setup_context=_context)
