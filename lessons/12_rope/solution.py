"""Lesson 12, RoPE: one way to solve the exercises."""

import torch
from torch import Tensor


def tables(length: int, channels: int, base: float) -> tuple[Tensor, Tensor]:
    """An outer product of positions and frequencies."""
    frequencies = base ** -torch.linspace(0, 1, channels // 2)
    angles = torch.arange(length)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The tables get an axis for the heads."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def rotations(q: Tensor, q_rotated: Tensor, cos: Tensor, sin: Tensor) -> int:
    """Rotate until it fits."""
    apart = []
    for _ in range(3):
        apart.append((q - q_rotated).norm())
        q = rotate(q, cos, sin)
    return min(range(3), key=apart.__getitem__)


def table_bytes(length: int, channels: int, layers: int) -> dict[str, int]:
    """Two tables of length · channels / 2 numbers, 4 bytes each."""
    pair = 2 * 4 * length * (channels // 2)
    return {"shared": pair, "per layer": layers * pair}
