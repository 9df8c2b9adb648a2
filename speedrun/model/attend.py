"""The attention function: three implementations of softmax(scale · q·kᵀ)·v under a mask, and which one is taken.

sdpa    torch's scaled_dot_product_attention with a boolean mask: everywhere, but every pair is looked at
flex    FlexAttention compiled for the block mask, which skips blocks that no one sees: GPUs
flash   FlashAttention-3, which gets documents as lengths: Hopper GPUs with the package flash_attn_interface, 16 bit
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.model.masks import Mask


def choose_attention(asked: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """sdpa, flex or flash, and why. asked: model.attention; dtype: of the queries.

    Raises ValueError where what was asked for cannot run here.
    """
    if asked == "sdpa":
        return "sdpa", "model.attention asks for it"
    if device.type != "cuda":
        if asked != "auto":
            raise ValueError(
                f"model.attention = {asked} needs a CUDA GPU, and this is {device.type} (FlexAttention has no backward "
                "pass there): use auto or sdpa"
            )
        return "sdpa", f"on {device.type} the others have no backward pass"
    missing = _flash_is_missing(device, dtype)
    if asked == "flash" and missing:
        raise ValueError(f"model.attention = flash cannot run: {missing}; use auto or flex")
    if asked != "flex" and not missing:
        return "flash", "flash_attn_interface is installed, the GPU is a Hopper and the queries have 16 bits"
    return "flex", "model.attention asks for it" if asked == "flex" else f"no FlashAttention-3: {missing}"


def _flash_is_missing(device: torch.device, dtype: torch.dtype) -> str:
    """Why FlashAttention-3 cannot run, or nothing."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the queries are {dtype}, not 16 bit"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"{torch.cuda.get_device_name(device)} is not a Hopper GPU"
    return "" if find_spec("flash_attn_interface") else "the package flash_attn_interface is not installed"


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
    """q, k, v [batch, time, heads, head_dim] → the same shape. scale: of the scores, None for 1 / √head_dim."""
    if mask is not None and mask.lengths is not None:
        return _flash(q, k, v, mask, scale)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is not None and mask.blocks is not None:
        y = _flex(q.device.type)(q, k, v, block_mask=mask.blocks, scale=scale)
    else:
        dense = None if mask is None else mask.dense
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, is_causal=dense is None, scale=scale)
    return y.transpose(1, 2)


@cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    """Rows end to end, [batch · time, heads, head_dim], and documents by where they begin."""
    from flash_attn_interface import flash_attn_varlen_func

    y = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=mask.lengths,
        cu_seqlens_k=mask.lengths,
        max_seqlen_q=mask.longest,
        max_seqlen_k=mask.longest,
        softmax_scale=scale,
        causal=True,
        window_size=(mask.window or -1, 0),  # keys to the left at most, −1 for all; none to the right
    )
    y = y[0] if isinstance(y, tuple) else y  # older versions also return the logarithms of sums
    return y.view(q.shape)
