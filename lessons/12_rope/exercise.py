"""Lesson 12, RoPE. Write the four functions; `shardrun lesson check 12` says what is right."""

from torch import Tensor


def tables(length: int, channels: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · frequency, each float32 [length, channels / 2].

    Positions count from 0. Frequencies, in radians per token, fall from 1 to 1/base in equal ratios: base to the power
    of −linspace(0, 1, channels / 2).
    """
    raise NotImplementedError


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by its angle: (a, b) → (a·cos − b·sin, a·sin + b·cos).

    x: float32 [batch, time, heads, channels]; channel c is paired with channel c + channels / 2. cos, sin: float32
    [time, channels / 2]. Returns the shape of x.
    """
    raise NotImplementedError


def rotations(q: Tensor, q_rotated: Tensor, cos: Tensor, sin: Tensor) -> int:
    """How often q was rotated to give q_rotated: 0, 1 (as it should be) or 2 (the bug). Shapes as in `rotate`."""
    raise NotImplementedError


def table_bytes(length: int, channels: int, layers: int) -> dict[str, int]:
    """Bytes of float32 cosines and sines.

    "shared": one pair of tables for all layers; "per layer": every layer keeps its own. All heads
    of a layer use the same; channels: of one head.
    """
    raise NotImplementedError
