"""Wrong attempts at lesson 12, and what their message must say."""

import torch

from lessons.checking import wrong_attempt


def _tables(length, channels, base, first=0, sign=-1):
    frequencies = base ** (sign * torch.linspace(0, 1, channels // 2))
    angles = torch.arange(first, first + length)[:, None] * frequencies
    return angles.cos(), angles.sin()


@wrong_attempt("tables", says="count from 1")
def from_one(length, channels, base):
    return _tables(length, channels, base, first=1)


@wrong_attempt("tables", says="the exponent is negative")
def rising(length, channels, base):
    return _tables(length, channels, base, sign=1)


@wrong_attempt("tables", says="one angle")
def per_channel(length, channels, base):
    return _tables(length, 2 * channels, base)


def _rotate(x, cos, sin, sign=1):
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sign * sin[:, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


@wrong_attempt("rotate", says="other way round")
def backwards(x, cos, sin):
    return _rotate(x, cos, sin, sign=-1)


@wrong_attempt("rotate", says="change their length")
def no_minus(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos + second * sin, first * sin + second * cos), dim=-1)


@wrong_attempt("rotate", says="rotate twice")
def twice(x, cos, sin):
    return _rotate(_rotate(x, cos, sin), cos, sin)


@wrong_attempt("rotate", says="axis of heads")
def without_heads(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


@wrong_attempt("rotations", says="rotations keep lengths")
def by_length(q, q_rotated, cos, sin):
    return 0 if torch.allclose(q.norm(dim=-1), q_rotated.norm(dim=-1), atol=1e-4) else 1


@wrong_attempt("rotations", says="rotated 2 times, and you say 1")
def only_once(q, q_rotated, cos, sin):
    return 0 if torch.equal(q, q_rotated) else 1


@wrong_attempt("table_bytes", says="two tables")
def cosine_only(length, channels, layers):
    return {"shared": 2 * length * channels, "per layer": 2 * length * channels * layers}


@wrong_attempt("table_bytes", says="for each pair of channels")
def full_width(length, channels, layers):
    return {"shared": 8 * length * channels, "per layer": 8 * length * channels * layers}


@wrong_attempt("table_bytes", says="each layer has its own")
def always_shared(length, channels, layers):
    return {"shared": 4 * length * channels, "per layer": 4 * length * channels}
