"""8-bit floating point: tensors quantised to e4m3 (448 at most) or e5m2 (57344 at most), and their products.

A tensor is stored as q ≈ x / scale, and a product of two such tensors is multiplied by both scales (Micikevicius et al.
2022, arXiv 2209.05433). Where the scale comes from:

- fixed: a constant that is known to fit (the head: 100/448 for hidden states, 1.6/448 for weights);
- current: this tensor's own largest magnitude, which costs a pass over it before the pass that quantises;
- delayed: the largest magnitude of the pass before, times a headroom for what may grow meanwhile. Nothing is read
  twice, and what grew beyond the headroom saturates. The first passes, where there is no past or it says little, use
  the current scale.

Everything saturates instead of overflowing; NaN stays NaN. fp8_linear.py makes layers of it.

This file needs no Triton: `triton` chooses between fp8_triton.py and the plain-torch references here, which only
emulate FP8 (they multiply in float32) and are for comparison, not for speed.
"""

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
SMALLEST_SCALE = 1e-30
"""Keeps 1 / scale finite for a tensor of zeros, or of numbers so small that FP8 is not for them."""

Quantized = tuple[Tensor, Tensor, Tensor]
"""q [rows, columns]; its transpose [columns, rows], contiguous (empty where not asked for); the scale, a scalar."""


def scale_reference(largest: Tensor, dtype: torch.dtype, headroom: float = 1.0) -> Tensor:
    """The scale that maps `largest`·headroom to the format's largest number. NaN for NaN."""
    return (largest.float() * headroom / LARGEST[dtype]).clamp(min=SMALLEST_SCALE)


def quantize_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale, saturated, rounded to the nearest (ties to even) number of the format."""
    limit = LARGEST[dtype]
    return (x.float() * (1.0 / scale)).clamp(-limit, limit).to(dtype)


def product_reference(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """A·Bᵀ of quantised a [m, k] and b [n, k], times both scales, added up in float32."""
    with torch.autocast(a.device.type, enabled=False):
        return (a.float() @ b.float().mT * scale_a * scale_b).to(dtype)


@torch.library.custom_op("speedrun::fp8_quantize", mutates_args=())
def quantize(x: Tensor, scale: float, dtype: torch.dtype, transpose: bool, triton: bool) -> Quantized:
    """Quantise x [rows, columns] of any strides with a fixed scale, or where that is 0 with its current scale."""
    if triton:
        from speedrun.kernels import fp8_triton

        return fp8_triton.quantize(x, dtype, transpose, scale)
    chosen = x.new_tensor(scale, dtype=torch.float32) if scale else scale_reference(x.abs().amax(), dtype)
    q = quantize_reference(x, chosen, dtype)
    return q, q.mT.contiguous() if transpose else q.new_empty(0), chosen


@torch.library.custom_op("speedrun::fp8_quantize_delayed", mutates_args=("state",))
def quantize_delayed(
    x: Tensor, state: Tensor, headroom: float, bootstrap: int, dtype: torch.dtype, triton: bool
) -> tuple[Tensor, Tensor]:
    """Quantise x [rows, columns] with the delayed scale, and move on the state → (q, scale).

    state: float32 [2], the largest magnitude of the pass before and the number of passes; zeros to start with. The
    first `bootstrap` passes use the current scale. All of it stays on the device.
    """
    if triton:
        from speedrun.kernels import fp8_triton

        q, _, scale = fp8_triton.quantize(x, dtype, False, 0.0, state, headroom, bootstrap)
        return q, scale
    largest = x.abs().amax().float()
    delayed = scale_reference(state[0], dtype, headroom)
    scale = torch.where(state[1] < bootstrap, scale_reference(largest, dtype), delayed)
    state.copy_(torch.stack((largest, state[1] + 1)))
    return quantize_reference(x, scale, dtype), scale


@torch.library.custom_op("speedrun::fp8_product", mutates_args=())
def product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, exact: bool, triton: bool
) -> Tensor:
    """A·Bᵀ·scale_a·scale_b of quantised a [m, k] and b [n, k] → [m, n] in `dtype`.

    exact: add up in float32 all along, for sums over tokens; otherwise as the matrix unit does, with about 14 bits.
    """
    if triton:
        from speedrun.kernels import fp8_triton

        return fp8_triton.product(a, b, scale_a, scale_b, dtype, exact, square=False)
    return product_reference(a, b, scale_a, scale_b, dtype)


@quantize.register_fake
def _(x: Tensor, scale: float, dtype: torch.dtype, transpose: bool, triton: bool) -> Quantized:
    q = x.new_empty(x.shape, dtype=dtype)
    return q, q.new_empty(tuple(x.shape)[::-1] if transpose else (0,)), x.new_empty((), dtype=torch.float32)


@quantize_delayed.register_fake
def _(
    x: Tensor, state: Tensor, headroom: float, bootstrap: int, dtype: torch.dtype, triton: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=torch.float32)


@product.register_fake
def _(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, exact: bool, triton: bool) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
