"""Rotary position embedding (RoPE): positions enter attention as rotations of queries and keys.

Channels are taken in pairs, and a pair at position t is turned by the angle t·f, each pair with its own frequency f.
Turning q by angle i·f and k by angle j·f leaves their dot product a function of (i − j)·f alone: attention sees how far
apart two tokens are, never where they stand. (Su et al. 2021, arXiv 2104.09864.)

That is why positions are simply counted along the row, even where a row holds several documents: within a document the
distances are the same wherever it begins, and the document mask lets no pair of different documents meet.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def rope_frequencies(
    channels: int, base: float, device: torch.device, dtype: torch.dtype, windows: Sequence[int] = ()
) -> Tensor:
    """In radians per token, [channels / 2]: they fall from 1 to 1/base in equal ratios, (1/base)^linspace(0, 1, …).

    windows: the attention windows that training has gone through, for each change of which YaRN changes them.
    """
    exponents = torch.linspace(0, 1, channels // 2, device=device, dtype=dtype)
    frequencies = base**-exponents
    for old, new in itertools.pairwise(windows):
        frequencies = yarn(frequencies, old, new)
    return frequencies


def rope_tables(
    length: int,
    channels: int,
    base: float,
    device: torch.device,
    dtype: torch.dtype,
    windows: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """`tables` with `rope_frequencies`."""
    return rotations(length, rope_frequencies(channels, base, device, dtype, windows))


def rotations(length: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position × frequency, each [length, channels / 2] in the frequencies' dtype.

    Attention makes these tables anew in every forward, which costs next to nothing beside one matrix product. Kept as
    buffers, or handed to the blocks as arguments, they would be rounded to bfloat16 by engines that cast a module's
    tensors (DeepSpeed) or its inputs (FSDP2). What is not kept cannot be cast, moved, sharded or saved wrongly.
    """
    positions = torch.arange(length, device=frequencies.device, dtype=frequencies.dtype)
    angles = positions[:, None] * frequencies
    return angles.cos(), angles.sin()


def yarn(frequencies: Tensor, old: int, new: int) -> Tensor:
    """Frequencies for a window of `new` tokens, of a model that was trained with one of `old` (both at least 1).

    A frequency that turns 32 times or more within the old window tells near tokens apart, and stays. One that turns
    once or less has only ever shown a part of its circle: it is slowed by old / new, so that the longer window shows
    no angle that the model has not seen. In between, in between. (YaRN's "NTK by parts", Peng et al. 2023, arXiv
    2309.00071, section 3.2, with α = 1 and β = 32.)
    """
    turns = old * frequencies / (2 * math.pi)
    keep = ((turns - 1) / 31).clamp(0, 1)
    slowed = old / new
    return frequencies * (slowed + keep * (1 - slowed))


def yarn_scale(windows: Sequence[int]) -> float:
    """The factor on attention scores after these windows: 0.2·ln(new / old) + 1 for every change.

    More keys flatten the softmax, and a larger scale sharpens it again (YaRN, section 3.4, has 0.1 on q and on k).
    """
    return math.prod(0.2 * math.log(new / old) + 1 for old, new in itertools.pairwise(windows))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2 × pairs channels of x by the tables' angles; the channels after them stay as they are.

    x is [batch, time, heads, head_dim], cos and sin are [time, pairs], and channel c is paired with channel c + pairs.
    float32 tables make the arithmetic float32 by type promotion even where x is bfloat16; the result has x's dtype.
    """
    pairs = cos.shape[-1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # the same angle for all heads
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), dim=-1).to(x.dtype)
