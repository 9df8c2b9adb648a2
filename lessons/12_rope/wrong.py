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


@wrong_attempt("tables", says="bfloat16 counts exactly to 256")
def positions_in_bfloat16(length, channels, base):
    frequencies = base ** -torch.linspace(0, 1, channels // 2)
    angles = torch.arange(length).bfloat16()[:, None].float() * frequencies
    return angles.cos(), angles.sin()


@wrong_attempt("tables", says="float32 is asked for")
def in_float64(length, channels, base):
    frequencies = base ** -torch.linspace(0, 1, channels // 2, dtype=torch.float64)
    angles = torch.arange(length)[:, None] * frequencies
    return angles.cos(), angles.sin()


@wrong_attempt("tables", says="nan")
def divided_by_pairs_less_one(length, channels, base):
    pairs = channels // 2
    frequencies = base ** -(torch.arange(pairs) / torch.tensor(pairs - 1.0))
    angles = torch.arange(length)[:, None] * frequencies
    return angles.cos(), angles.sin()


@wrong_attempt("rotate", says="Your function has changed `x`")
def in_place(x, cos, sin):
    turned = _rotate(x, cos, sin)
    x.zero_()
    return turned


@wrong_attempt("rotations", says="0, 1 or 2 is asked for")
def a_tensor(q, q_rotated, cos, sin):
    return torch.tensor(int(not torch.equal(q, q_rotated)))


@wrong_attempt("rotations", says="rotated 1 times, and you say 2")
def never_once(q, q_rotated, cos, sin):
    return 0 if torch.equal(q, q_rotated) else 2


@wrong_attempt("rotations", says="rotated 0 times, and you say 1")
def from_one_on(q, q_rotated, cos, sin):
    once = _rotate(q, cos, sin)
    return 1 if (q - q_rotated).norm() < 1e-3 or (once - q_rotated).norm() < 1e-3 else 2


@wrong_attempt("table_bytes", says="counts elements")
def elements(length, channels, layers):
    return {"shared": length * channels, "per layer": length * channels * layers}


@wrong_attempt("table_bytes", says="half of it")
def sixteen_bits(length, channels, layers):
    return {"shared": 4 * length * channels, "per layer": 2 * length * channels * layers}


@wrong_attempt("tables", says="With 50 positions")
def in_half_precision(length, channels, base):
    return tuple(table.half().float() for table in _tables(length, channels, base))


@wrong_attempt("rotate", says="signs and places change, no number")
def a_little_longer(x, cos, sin):
    return _rotate(x, cos, sin) * (1 + 1e-5)


@wrong_attempt("rotations", says="of about 0.001")
def not_far_from_it(q, q_rotated, cos, sin):
    for times in range(3):
        if torch.allclose(q, q_rotated, atol=1e-2):
            return times
        q = _rotate(q, cos, sin)
    return 2
