"""Linear layers whose products are in FP8: the head, and the two of the MLP.

                forward, e4m3                                            backward
    head        fixed scales, 100/448 for hidden states, 1.6/448         FP8: the gradient in e5m2 with its current
                for weights                                              scale; both sums in float32 (`product`)
    MLP up      current scales                                           in the dtype of the inputs (bf16)
    MLP down    delayed scales                                           in the dtype of the inputs (bf16)

The gradient's current scale makes any factor on the loss drop out. Layers are for training: an evaluation calls the
ordinary ones. Scale states are per rank and no part of a checkpoint: a resumed run starts them anew.
"""

import torch
from torch import Tensor

from speedrun.config import Kernels
from speedrun.kernels import compute_dtype
from speedrun.kernels.fp8 import product, quantize, quantize_delayed
from speedrun.kernels.fp8 import way as choose_way
from speedrun.kernels.fp8_formats import E4M3, E5M2, Quantized

HEAD_INPUT_SCALE, HEAD_WEIGHT_SCALE = 100 / 448, 1.6 / 448
INPUT_HEADROOM, WEIGHT_HEADROOM = 1.80, 1.12
INPUT_BOOTSTRAP, WEIGHT_BOOTSTRAP = 1, 16
"""Passes with the current scale before the delayed one. The MLP's second weight starts at zero and grows fast."""


def head(x: Tensor, weight: Tensor, kernels: Kernels) -> Tensor:
    """x·Wᵀ, x [..., in], weight [out, in] → [..., out] in the dtype of matrix products, for the output head."""
    rows, way = _rows(x), choose_way(kernels, x.device)
    x8, x8t, x_scale = quantize(rows.detach(), HEAD_INPUT_SCALE, E4M3, True, way)
    w8, w8t, w_scale = quantize(weight.detach(), HEAD_WEIGHT_SCALE, E4M3, True, way)
    y = linear_fp8_backward(rows, weight, x8, w8, x8t, w8t, x_scale, w_scale, way)
    return y.unflatten(0, x.shape[:-1])


def mlp_up(x: Tensor, weight: Tensor, relu2: bool, kernels: Kernels) -> Tensor:
    """x·Wᵀ or, with relu2, relu(x·Wᵀ)², x [..., in], weight [out, in] → [..., out]."""
    rows, way = _rows(x), choose_way(kernels, x.device)
    x8, _, x_scale = quantize(rows.detach(), 0.0, E4M3, False, way)
    w8, _, w_scale = quantize(weight.detach(), 0.0, E4M3, False, way)
    y = linear(rows, weight.to(rows.dtype), x8, w8, x_scale, w_scale, relu2, way)
    return y.unflatten(0, x.shape[:-1])


class DelayedScales:
    """The states of a layer's two delayed scales: see `quantize_delayed`. Made on the device of the first input."""

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.weight: Tensor | None = None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both states, float32 [2], on this device."""
        if self.input is None or self.weight is None or self.input.device != device:
            self.input, self.weight = torch.zeros(2, device=device), torch.zeros(2, device=device)
        return self.input, self.weight


def mlp_down(x: Tensor, weight: Tensor, scales: DelayedScales, kernels: Kernels) -> Tensor:
    """x·Wᵀ, x [..., in], weight [out, in] → [..., out]. Moves the scales on."""
    rows, way = _rows(x), choose_way(kernels, x.device)
    input_state, weight_state = scales.on(x.device)
    x8, x_scale = quantize_delayed(rows.detach(), input_state, INPUT_HEADROOM, INPUT_BOOTSTRAP, E4M3, way)
    w8, w_scale = quantize_delayed(weight.detach(), weight_state, WEIGHT_HEADROOM, WEIGHT_BOOTSTRAP, E4M3, way)
    y = linear(rows, weight.to(rows.dtype), x8, w8, x_scale, w_scale, False, way)
    return y.unflatten(0, x.shape[:-1])


def _rows(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x)).flatten(0, -2)


@torch.library.custom_op("speedrun::fp8_linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, x8: Tensor, w8: Tensor, x_scale: Tensor, w_scale: Tensor, relu2: bool, way: str
) -> Tensor:
    """x8·w8ᵀ times the scales, its ReLU squared on request; backward as if it had been x·Wᵀ, in x's dtype.

    x [rows, in], weight [out, in] and their quantised forms → [rows, out] in x's dtype.
    """
    if way == "triton":
        from speedrun.kernels import fp8_triton

        return fp8_triton.product(x8, w8, x_scale, w_scale, x.dtype, exact=False, square=relu2)
    # Emulated, the square is rounded once, as in the kernel; multiplied in FP8, float32 would be twice the traffic.
    dtype = torch.float32 if relu2 and way == "emulated" else x.dtype
    y = product(x8, w8, x_scale, w_scale, dtype, False, way)
    return y.relu().square().to(x.dtype) if relu2 else y


@linear.register_fake
def _(
    x: Tensor, weight: Tensor, x8: Tensor, w8: Tensor, x_scale: Tensor, w_scale: Tensor, relu2: bool, way: str
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _linear_context(ctx, inputs, output) -> None:
    x, weight, *_, ctx.relu2, ctx.way = inputs
    ctx.save_for_backward(x, weight, *([output] if ctx.relu2 else []))


def _linear_backward(ctx, gradient: Tensor):
    x, weight, *y = ctx.saved_tensors
    if ctx.relu2 and ctx.way == "triton":
        from speedrun.kernels.relu2 import relu2_backward

        gradient = relu2_backward(y[0], gradient)
    elif ctx.relu2:
        gradient = torch.where(y[0] <= 0, 0, 2 * y[0].float().sqrt() * gradient).to(gradient.dtype)
    return gradient @ weight, gradient.mT @ x, None, None, None, None, None, None


linear.register_autograd(_linear_backward, setup_context=_linear_context)


@torch.library.custom_op("speedrun::fp8_linear_fp8_backward", mutates_args=())
def linear_fp8_backward(
    x: Tensor,
    weight: Tensor,
    x8: Tensor,
    w8: Tensor,
    x8t: Tensor,
    w8t: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    way: str,
) -> Tensor:
    """x8·w8ᵀ times the scales; backward in FP8 as well, of which it keeps the transposes and neither x nor the weight.

    x [rows, in], weight [out, in], their quantised forms and those transposed → [rows, out] in x's dtype.
    """
    return product(x8, w8, x_scale, w_scale, x.dtype, False, way)


@linear_fp8_backward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    x8: Tensor,
    w8: Tensor,
    x8t: Tensor,
    w8t: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    way: str,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fp8_context(ctx, inputs, output) -> None:
    x, weight, _, _, x8t, w8t, x_scale, w_scale, ctx.way = inputs
    ctx.dtypes = x.dtype, weight.dtype
    ctx.save_for_backward(x8t, w8t, x_scale, w_scale)


def _fp8_backward(ctx, gradient: Tensor):
    x8t, w8t, x_scale, w_scale = ctx.saved_tensors
    dx, dw = fp8_gradients(
        quantize(gradient, 0.0, E5M2, True, ctx.way), (x8t, x_scale), (w8t, w_scale), ctx.dtypes, ctx.way
    )
    return dx, dw, None, None, None, None, None, None, None


linear_fp8_backward.register_autograd(_fp8_backward, setup_context=_fp8_context)


def fp8_gradients(
    gradient: Quantized,
    x: tuple[Tensor, Tensor],
    weight: tuple[Tensor, Tensor],
    dtypes: tuple[torch.dtype, torch.dtype],
    way: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight in the given dtypes, from (transpose, scale) of each and the quantised gradient."""
    (g8, g8t, g_scale), (x8t, x_scale), (w8t, w_scale) = gradient, x, weight
    dx = product(g8, w8t, g_scale, w_scale, dtypes[0], True, way)
    dw = product(g8t, x8t, g_scale, x_scale, dtypes[1], True, way)
    return dx, dw
