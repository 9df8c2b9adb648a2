"""Attention, softmax(scale · q·kᵀ)·v under a mask, by one of four functions: see speedrun/attention_choice.py."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.attention_choice import Where
from speedrun.model.flex import flex
from speedrun.model.masks import Mask


def where(device: torch.device, dtype: torch.dtype) -> Where:
    """What `choose_attention` asks about this process; dtype: of the queries."""
    major, minor = torch.__version__.split(".")[:2]
    sixteen_bit = dtype in (torch.bfloat16, torch.float16)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    hopper = capability[0] == 9 and sixteen_bit
    return Where(
        device.type, capability, (int(major), int(minor)), sixteen_bit, hopper and flash_function() is not None
    )


@cache
def flash_function() -> Callable[..., Any] | None:
    """FlashAttention-3's function. What counts is the function: on PyPI lies an empty package of this name."""
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None) -> Tensor:
    """q, k, v [batch, time, heads, head_dim], of one dtype → the same shape. scale: of the scores, None for
    1 / √head_dim.
    """
    if mask is not None and mask.lengths is not None:
        return _by_lengths(q, k, v, mask, scale)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is not None and mask.blocks is not None:
        y = flex(q, k, v, mask, scale)
    else:
        dense = None if mask is None else mask.dense
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, is_causal=dense is None, scale=scale)
    return y.transpose(1, 2)


def _by_lengths(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    """Rows end to end, [batch · time, heads, head_dim], and documents by where they begin."""
    window = (mask.window or -1, 0)  # keys to the left at most, −1 for all; none to the right
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    y: Any
    if mask.kind == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        ends: Any = (mask.lengths, mask.lengths, mask.longest, mask.longest)
        y = varlen_attn(rows[0], rows[1], rows[2], *ends, scale=scale, window_size=window)
    else:
        function = flash_function()
        assert function is not None, "choose_attention has looked for it"
        y = function(
            *rows,
            cu_seqlens_q=mask.lengths,
            cu_seqlens_k=mask.lengths,
            max_seqlen_q=mask.longest,
            max_seqlen_k=mask.longest,
            softmax_scale=scale,
            causal=True,
            window_size=window,
        )
    y = y[0] if isinstance(y, tuple) else y  # older versions of FlashAttention also return logarithms of sums
    return y.view(q.shape)  # type: ignore[no-any-return]


def activate_flash(capability: tuple[int, int]) -> str:
    """Put a newer FlashAttention behind torch's variable-length attention, for the whole process, where torch's own
    switch finds one that has windows; returns its name.

    FlashAttention-3 for Hopper GPUs; FlashAttention-4 for Hopper and Blackwell, with windows from torch 2.12 on. Both
    are prototypes in torch. Not run on a GPU yet.
    """
    from torch.nn.attention import activate_flash_attention_impl

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    candidates = ["FA3"] if capability[0] == 9 else []
    candidates += ["FA4"] if capability[0] in (9, 10) and version >= (2, 12) else []
    for name in candidates:
        try:
            activate_flash_attention_impl(name)
        except (ImportError, RuntimeError):  # no such package, or an empty one
            continue
        return f"FlashAttention-{name[-1]}"
    return "FlashAttention-2"
