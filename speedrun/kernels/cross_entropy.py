"""Cross-entropy straight from hidden states and head, a block of rows at a time.

The logits of a batch are the largest tensor of a step: 65,536 tokens × 50,304 words in float32 are 13 GB, and eager
torch keeps several of them. Here a block of rows is multiplied out, one kernel turns its logits into losses and, in
place, into their gradients, and these are multiplied back into the gradients of hidden states and head weight at once.
What stays for backward is these two; backward multiplies them by the gradient of the loss, whatever that is: the loss
is a scalar, so that this is exact (an outer factor, a mean over micro-batches or ranks, an optimizer's loss scaling).
"""

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from speedrun.config import SIGMOID_MIDDLE, SIGMOID_SCALE
from speedrun.kernels import compute_dtype
from speedrun.kernels.fp8 import product, quantize, way
from speedrun.kernels.fp8_formats import E4M3, E5M2
from speedrun.kernels.fp8_linear import HEAD_INPUT_SCALE, HEAD_WEIGHT_SCALE, fp8_gradients

ROWS = 4096
"""Rows of a block at most: enough to fill a GPU, and 400 MB of bf16 logits for 50,304 words."""
COLUMNS = 4096
"""Columns of its row that a program takes at a time."""

NONE, TANH, SIGMOID = (tl.constexpr(form) for form in range(3))
"""The softcap's forms."""
MIDDLE, SCALE = tl.constexpr(SIGMOID_MIDDLE), tl.constexpr(SIGMOID_SCALE)


def cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float,
    reduction: str,
    form: str = "tanh",
    future: tuple[float, ...] = (),
) -> Tensor:
    """As `cross_entropy`, from logits that exist as a whole."""
    logits = F.linear(hidden, weight)[..., :vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap and form == "sigmoid":
        logits = softcap * torch.sigmoid((logits - SIGMOID_MIDDLE) / SIGMOID_SCALE)
    elif softcap:
        logits = softcap * torch.tanh(logits / softcap)
    rows, words = logits.flatten(0, -2), targets.reshape(-1, 1 + len(future))
    losses = [
        weight * F.cross_entropy(rows, words[:, k], ignore_index=-1, reduction="sum")
        for k, weight in enumerate((1.0, *future))
    ]
    total = torch.stack(losses).sum()
    return total / (words[:, 0] != -1).sum() if reduction == "mean" else total


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float,
    reduction: str = "mean",
    fp8: bool = False,
    form: Literal["tanh", "sigmoid"] = "tanh",
    future: tuple[float, ...] = (),
) -> Tensor:
    """The cross-entropy, float32, in nats, of the capped logits hidden·Wᵀ (`speedrun.model.loss.softcap`; 0: no cap).

    hidden [..., width]; weight [rows, width], of which the first vocab_size are words and the others padding without
    probability or gradient; targets int64 [...], −1 where there is nothing to predict; reduction 'mean' over the other
    targets (nan where there is none) or 'sum'. A target that is no word makes the loss nan. Matrix products are in
    autocast's dtype inside autocast; with fp8 and a gradient to come, in FP8 as in `fp8_linear.head`.

    With `future`, targets are [..., 1 + len(future)]: that of the next token, then those further on, which the same
    logits predict and which count with these weights (`speedrun.model.loss.multi_token_loss`). 'mean' divides by the
    number of next tokens.
    """
    rows = hidden.to(compute_dtype(hidden)).flatten(0, -2)
    words, shares = targets.reshape(-1, 1 + len(future)), [1.0, *future]
    arguments = (rows, weight, words, shares, vocab_size, softcap, form, reduction == "mean")
    if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        return loss_and_gradients(*arguments, fp8)[0]
    return loss_only(*arguments)


@triton.jit
def capped(z, softcap, CAP: tl.constexpr):
    """softcap·tanh(z/softcap), or with SIGMOID softcap·σ((z + 5)/7.5), and its derivative."""
    if CAP == SIGMOID:
        share = tl.sigmoid((z - MIDDLE) / SCALE)
        return softcap * share, softcap * share * (1.0 - share) / SCALE
    elif CAP == TANH:
        # tanh(u) = 2σ(2u) − 1; its rounding error, 1e-7 of the cap, is far below that of any logit
        tanh = 2.0 * tl.sigmoid(2.0 * (z / softcap)) - 1.0
        return softcap * tanh, 1.0 - tanh * tanh
    else:
        return z, 1.0


@triton.jit
def cross_entropy_kernel(
    logits,
    targets,
    shares,
    losses,
    factor,
    stride,
    vocab_size,
    columns,
    softcap,
    CAP: tl.constexpr,
    TARGETS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program: losses[row] = Σ_k shares[k]·(log Σ exp(z) − z[targets[row, k]]), over the TARGETS of them
    that are not −1.

    With GRADIENT the row's logits are replaced by `factor[0]` times the loss's gradient, zero in padding columns.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    targets += row * TARGETS
    mass = 0.0  # what the row's targets count together
    present = 0
    at_targets = 0.0
    for k in tl.static_range(TARGETS):
        target = tl.load(targets + k)
        known = (target >= 0) & (target < vocab_size)
        share = tl.where(target == -1, 0.0, tl.load(shares + k))
        at_target, unused = capped(tl.load(logits + tl.where(known, target, 0)).to(tl.float32), softcap, CAP)
        mass += share
        present += (target != -1).to(tl.int32)
        # A target that is no word is a nan, and one that is not there is nothing, whatever the row holds.
        at_targets += tl.where(target == -1, 0.0, share * tl.where(known, at_target, float("nan")))
    # Sum of exponentials relative to the largest logit so far (Milakov and Gimelshein 2018, arXiv 1805.02867).
    largest = -float("inf")
    total = 0.0
    for start in range(0, vocab_size, BLOCK):
        j = start + tl.arange(0, BLOCK)
        z, _ = capped(tl.load(logits + j, mask=j < vocab_size, other=0.0).to(tl.float32), softcap, CAP)
        z = tl.where(j < vocab_size, z, -float("inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), 0)
    log_total = largest + tl.log(total)
    tl.store(losses + row, tl.where(present == 0, 0.0, mass * log_total) - at_targets)
    if GRADIENT:
        scale = tl.load(factor)
        for start in range(0, columns, BLOCK):
            j = start + tl.arange(0, BLOCK)
            z, slope = capped(tl.load(logits + j, mask=j < vocab_size, other=0.0).to(tl.float32), softcap, CAP)
            gradient = mass * tl.exp(z - log_total)
            for k in tl.static_range(TARGETS):
                gradient -= tl.where(j == tl.load(targets + k), tl.load(shares + k), 0.0)
            gradient = tl.where((present == 0) | (j >= vocab_size), 0.0, gradient * slope * scale)
            tl.store(logits + j, gradient.to(logits.dtype.element_ty), mask=j < columns)


def _losses(
    logits: Tensor,
    targets: Tensor,
    shares: Tensor,
    factor: Tensor,
    vocab_size: int,
    softcap: float,
    form: str,
    gradient: bool,
) -> Tensor:
    losses = torch.empty(len(logits), device=logits.device)
    kind = NONE if not softcap else SIGMOID if form == "sigmoid" else TANH
    cross_entropy_kernel[(len(logits),)](
        logits, targets, shares, losses, factor, logits.stride(0), vocab_size, logits.shape[1], softcap,
        CAP=kind, TARGETS=targets.shape[1], GRADIENT=gradient,
        BLOCK=min(COLUMNS, triton.next_power_of_2(logits.shape[1])), num_warps=8,
    )  # fmt: skip
    return losses


def _on_device(shares: list[float], hidden: Tensor) -> Tensor:
    return torch.tensor(shares, dtype=torch.float32).to(hidden.device, non_blocking=True)


def _factor(targets: Tensor, mean: bool) -> Tensor:
    """What a row's loss counts with: one, or one over the number of rows with a next token."""
    count = (targets[:, 0] != -1).sum().float()
    return 1.0 / count if mean else torch.ones_like(count)


@torch.library.custom_op("speedrun::cross_entropy", mutates_args=())
def loss_only(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shares: list[float],
    vocab_size: int,
    softcap: float,
    form: str,
    mean: bool,
) -> Tensor:
    """The loss of hidden [n, width] and targets [n, len(shares)], without gradients."""
    weight, targets, counts = weight.to(hidden.dtype), targets.contiguous(), _on_device(shares, hidden)
    factor = _factor(targets, mean)
    total = torch.zeros((), device=hidden.device)
    for rows, words in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        total += _losses(rows @ weight.mT, words, counts, factor, vocab_size, softcap, form, gradient=False).sum()
    return total * factor


@torch.library.custom_op("speedrun::cross_entropy_and_gradients", mutates_args=())
def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shares: list[float],
    vocab_size: int,
    softcap: float,
    form: str,
    mean: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient by hidden in hidden's dtype, its gradient by weight in float32); arguments as `loss_only`."""
    targets, counts = targets.contiguous(), _on_device(shares, hidden)
    factor = _factor(targets, mean)
    total = torch.zeros((), device=hidden.device)
    dx, dw = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    if fp8:
        how = way("triton", hidden.device)
        x8, x8t, x_scale = quantize(hidden, HEAD_INPUT_SCALE, E4M3, True, how)
        w8, w8t, w_scale = quantize(weight, HEAD_WEIGHT_SCALE, E4M3, True, how)
    else:
        weight = weight.to(hidden.dtype)
    for start in range(0, len(hidden), ROWS):
        rows = slice(start, start + ROWS)
        x = hidden[rows]
        logits = product(x8[rows], w8, x_scale, w_scale, x.dtype, False, how) if fp8 else x @ weight.mT
        total += _losses(logits, targets[rows], counts, factor, vocab_size, softcap, form, gradient=True).sum()
        if fp8:
            gradient = quantize(logits, 0.0, E5M2, True, how)
            dtypes = (x.dtype, torch.float32)
            dx[rows], part = fp8_gradients(gradient, (x8t[:, rows], x_scale), (w8t, w_scale), dtypes, how)
            dw += part
        else:
            torch.mm(logits, weight, out=dx[rows])
            dw += _float32_product(logits.mT, x)
    return total * factor, dx, dw


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """A·B in float32 of operands in a narrower dtype, which on a GPU stay in it."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):  # the caller's would round what was just widened
        return a.float() @ b.float()


@loss_only.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shares: list[float],
    vocab_size: int,
    softcap: float,
    form: str,
    mean: bool,
) -> Tensor:
    return hidden.new_empty((), dtype=torch.float32)


@loss_and_gradients.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shares: list[float],
    vocab_size: int,
    softcap: float,
    form: str,
    mean: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)


def _context(ctx, inputs, output) -> None:
    _, dx, dw = output
    ctx.set_materialize_grads(False)  # dx and dw have none, and zeros in their place would cost as much as they do
    ctx.save_for_backward(dx, dw)
    ctx.weight_dtype = inputs[1].dtype


def _backward(ctx, gradient: Tensor | None, *_):
    if gradient is None:
        return (None,) * 9
    dx, dw = ctx.saved_tensors
    return dx * gradient, (dw * gradient).to(ctx.weight_dtype), *(None,) * 7


loss_and_gradients.register_autograd(_backward, setup_context=_context)
