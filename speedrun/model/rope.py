"""Rotary position embedding (RoPE): positions enter attention as rotations of queries and keys.

Channels are taken in pairs, and a pair at position t is turned by the angle t·f, each pair with its own frequency f.
Turning q by angle i·f and k by angle j·f leaves their dot product a function of (i − j)·f alone: attention sees how far
apart two tokens are, never where they stand. (Su et al. 2021, arXiv 2104.09864.)

That is why positions are simply counted along the row, even where a row holds several documents: within a document the
distances are the same wherever it begins, and the document mask lets no pair of different documents meet.
"""

import torch
from torch import Tensor


def rope_tables(
    length: int, channels: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position × frequency, each [length, channels / 2] in `dtype`.

    The frequencies, in radians per token, fall from 1 to 1/base in equal ratios: (1/base)^linspace(0, 1, channels / 2).

    Attention makes these tables anew in every forward, which costs next to nothing beside one matrix product. Kept as
    buffers, or handed to the blocks as arguments, they would be rounded to bfloat16 by engines that cast a module's
    tensors (DeepSpeed) or its inputs (FSDP2). What is not kept cannot be cast, moved, sharded or saved wrongly.
    """
    exponents = torch.linspace(0, 1, channels // 2, device=device, dtype=dtype)
    positions = torch.arange(length, device=device, dtype=dtype)
    angles = positions[:, None] * base**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2 × pairs channels of x by the tables' angles; the channels after them stay as they are.

    x is [batch, time, heads, head_dim], cos and sin are [time, pairs], and channel c is paired with channel c + pairs.
    float32 tables make the arithmetic float32 by type promotion even where x is bfloat16; the result has x's dtype.
    """
    pairs = cos.shape[-1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # the same angle for all heads
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), dim=-1).to(x.dtype)
