"""8-bit floating point: tensors quantised to e4m3 (448 at most) or e5m2 (57344 at most), and their products.

A tensor is stored as q ≈ x / scale, and a product of two such tensors is multiplied by both scales (Micikevicius et al.
2022, arXiv 2209.05433). Where the scale comes from:

- fixed: a constant that is known to fit (the head: 100/448 for hidden states, 1.6/448 for weights);
- current: this tensor's own largest magnitude, which costs a pass over it before the pass that quantises;
- delayed: the largest magnitude of the pass before, times a headroom for what may grow meanwhile. Nothing is read
  twice, and what grew beyond the headroom saturates. The first passes, where there is no past or it says little, use
  the current scale.

Everything saturates instead of overflowing; NaN stays NaN. fp8_linear.py makes layers of it. Who computes (`Way`):

- emulated: plain torch that multiplies in float32, for CPUs: it shows FP8's errors and not its speed;
- scaled_mm: plain torch quantises, torch._scaled_mm (cuBLASLt) multiplies in FP8: every run on a GPU;
- triton: the kernels of fp8_triton.py: lesson 15's, and Triton's interpreter. No run on a GPU takes them: on an H100
  their product had 0.65 to 0.74 of _scaled_mm's speed (measured.py), and nobody has seen the mended ones there yet.

**No FP8 of this project has been seen right on a GPU yet**, in whichever way: what the first run there found, and what
explains it, is told in tests/kernels/checks/__init__.py.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.config import Kernels
from speedrun.kernels import INTERPRETED
from speedrun.kernels.fp8_formats import LARGEST, SMALLEST_SCALE, Quantized, transposed

Way = Literal["emulated", "scaled_mm", "triton"]

MULTIPLE = 16
"""torch._scaled_mm wants as many columns of the result, and terms of the sum, as a multiple of this."""


def way(kernels: Kernels, device: torch.device) -> Way:
    """Who computes FP8 on this device, in a run with this `model.kernels`."""
    if device.type == "cuda":
        return "scaled_mm"
    return "triton" if kernels == "triton" and INTERPRETED else "emulated"


def in_words(kernels: Kernels, cpu: bool) -> str:
    """Who computes a run's FP8, for its user."""
    return {
        "emulated": "emulated in float32 (on a CPU a fifth slower than without)",
        "scaled_mm": "by torch._scaled_mm (not seen on a GPU yet)",
        "triton": "by Triton's interpreter",
    }[way(kernels, torch.device("cpu" if cpu else "cuda"))]


def scale_reference(largest: Tensor, dtype: torch.dtype, headroom: float = 1.0) -> Tensor:
    """The scale that maps `largest`·headroom to the format's largest number. NaN for NaN."""
    largest = largest.float() * headroom
    # Not by a Python number: a CUDA tensor would be multiplied by its reciprocal, a unit in the last place off.
    return (largest / torch.full_like(largest, LARGEST[dtype])).clamp(min=SMALLEST_SCALE)


def quantize_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale, saturated, rounded to the nearest (ties to even) number of the format."""
    limit = LARGEST[dtype]
    return (x.float() * (1.0 / scale)).clamp(-limit, limit).to(dtype)


def product_reference(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """A·Bᵀ of quantised a [m, k] and b [n, k], times both scales, added up in float32."""
    with torch.autocast(a.device.type, enabled=False):
        return (a.float() @ b.float().mT * scale_a * scale_b).to(dtype)


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    """The same by torch._scaled_mm, which takes two e4m3 operands, or one in e5m2. Odd sizes are filled up with zeros,
    which costs a copy: the vocabulary is padded anyway, and tokens are many."""
    columns = b.shape[0]
    a, b = _filled(a, 1), _filled(b, MULTIPLE)
    result = torch._scaled_mm(a, b.mT, scale_a, scale_b, out_dtype=dtype, use_fast_accum=not exact)
    return result if result.shape[1] == columns else result[:, :columns].contiguous()


def _filled(q: Tensor, rows: int) -> Tensor:
    """q [m, k] with zeros up to multiples of `rows` and MULTIPLE, its rows contiguous."""
    more = (-q.shape[1] % MULTIPLE, -q.shape[0] % rows)
    if any(more):
        return F.pad(q.view(torch.uint8), (0, more[0], 0, more[1])).view(q.dtype)  # the byte 0 is the number 0
    return q if q.stride() == (q.shape[1], 1) else q.contiguous()


@torch.library.custom_op("speedrun::fp8_quantize", mutates_args=())
def quantize(x: Tensor, scale: float, dtype: torch.dtype, transpose: bool, way: str) -> Quantized:
    """Quantise x [rows, columns] of any strides with a fixed scale, or where that is 0 with its current scale."""
    if way == "triton":
        from speedrun.kernels import fp8_triton

        return fp8_triton.quantize(x, dtype, transpose, scale)
    chosen = x.new_tensor(scale, dtype=torch.float32) if scale else scale_reference(x.abs().amax(), dtype)
    q = quantize_reference(x, chosen, dtype).contiguous()
    return q, transposed(q, transpose), chosen


@torch.library.custom_op("speedrun::fp8_quantize_delayed", mutates_args=("state",))
def quantize_delayed(
    x: Tensor, state: Tensor, headroom: float, bootstrap: int, dtype: torch.dtype, way: str
) -> tuple[Tensor, Tensor]:
    """Quantise x [rows, columns] with the delayed scale, and move on the state → (q, scale).

    state: float32 [2], the largest magnitude of the pass before and the number of passes; zeros to start with. The
    first `bootstrap` passes use the current scale. All of it stays on the device.
    """
    if way == "triton":
        from speedrun.kernels import fp8_triton

        q, _, scale = fp8_triton.quantize(x, dtype, False, 0.0, state, headroom, bootstrap)
        return q, scale
    largest = x.abs().amax().float()
    delayed = scale_reference(state[0], dtype, headroom)
    scale = torch.where(state[1] < bootstrap, scale_reference(largest, dtype), delayed)
    state.copy_(torch.stack((largest, state[1] + 1)))
    return quantize_reference(x, scale, dtype).contiguous(), scale


@torch.library.custom_op("speedrun::fp8_product", mutates_args=())
def product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, exact: bool, way: str
) -> Tensor:
    """A·Bᵀ·scale_a·scale_b of quantised a [m, k] and b [n, k] → [m, n] in `dtype`.

    A Hopper matrix unit adds up FP8 products with about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). exact:
    over short pieces of the sum only (128 terms in our kernel), which are added up in float32; for the long sums of
    both gradients, over tokens and over the vocabulary. Otherwise all along.
    """
    if way == "triton":
        from speedrun.kernels import fp8_triton

        return fp8_triton.product(a, b, scale_a, scale_b, dtype, exact, square=False)
    if way == "scaled_mm":
        return scaled_mm(a, b, scale_a, scale_b, dtype, exact)
    return product_reference(a, b, scale_a, scale_b, dtype)


@quantize.register_fake
def _(x: Tensor, scale: float, dtype: torch.dtype, transpose: bool, way: str) -> Quantized:
    q = x.new_empty(x.shape, dtype=dtype)
    return q, q.new_empty(tuple(x.shape)[::-1] if transpose else (0,)), x.new_empty((), dtype=torch.float32)


@quantize_delayed.register_fake
def _(x: Tensor, state: Tensor, headroom: float, bootstrap: int, dtype: torch.dtype, way: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=torch.float32)


@product.register_fake
def _(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, exact: bool, way: str) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
