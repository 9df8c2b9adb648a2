"""Checks of lesson 12."""

import torch

from lessons.cases import generated, st
from lessons.checking import Wrong, expect, expect_numbers, expect_tensor, is_whole, rounded_alike


def _tables(length, channels, base, dtype=torch.float32):
    frequencies = base ** -torch.linspace(0, 1, channels // 2, dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotated(x, cos, sin):
    """By complex numbers: independent of the exercise's formula."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos, sin)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def _same(a, b):
    return bool(torch.allclose(a, b, atol=1e-4, rtol=1e-4))


def tables(theirs):
    _table(theirs, 50, 8, 1024.0)
    for length, channels, base in ((5000, 8, 10_000.0), (300, 128, 1024.0), (4, 2, 100.0), (1, 6, 100.0)):
        _table(theirs, length, channels, base)
    generated(
        lambda length, pairs, base: _table(theirs, length, 2 * pairs, base), most=30,
        length=st.integers(1, 3000), pairs=st.integers(1, 40), base=st.sampled_from([100.0, 1024.0, 500_000.0]),
    )  # fmt: skip


def _table(theirs, length, channels, base):
    where = f"With {length} positions, {channels} channels and base {base:g}: "
    found = theirs(length, channels, base)
    expect(isinstance(found, tuple) and len(found) == 2, "Two tensors are asked for: (cos, sin).")
    cos, sin = found
    expect(isinstance(cos, torch.Tensor) and isinstance(sin, torch.Tensor), "Two tensors are asked for: (cos, sin).")
    right = _tables(length, channels, base)
    shape = tuple(cos.shape)
    expect(
        shape != (length, channels) or channels == 2 * length,
        f"Your table has {channels} columns, one per channel. A pair of channels has one angle: channels / 2 columns.",
    )
    expect(shape == tuple(sin.shape) == (length, channels // 2), f"Your table is {shape}, not [length, channels / 2].")
    for what, mine in (("cosine", cos), ("sine", sin)):
        expect(mine.dtype == torch.float32, f"{where}your {what} is in {mine.dtype}; float32 is asked for.")
        expect(bool(mine.isfinite().all()), f"{where}there are nan in your {what}.")
    if _near(cos, right[0]) and _near(sin, right[1]):
        return
    if length > 256 and _near(cos[:200], right[0][:200]):
        first = int(((cos - right[0]).abs().amax(-1) > 2e-3).nonzero()[0, 0])
        raise Wrong(
            f"{where}from position {first} on your table is off by up to {(cos - right[0]).abs().max().item():.2f}: "
            "positions or angles are rounded (bfloat16 counts exactly to 256 only). Compute them in float32."
        )
    if _same(cos, right[1]) and _same(sin, right[0]):
        raise Wrong("Cosine and sine are exchanged.")
    if torch.allclose(cos[0], torch.cos(base ** -torch.linspace(0, 1, channels // 2)), atol=1e-4):
        raise Wrong("Your positions count from 1. The first token's is 0: it is not turned at all.")
    if cos.isnan().any() or (cos[1] - torch.cos(base ** torch.linspace(0, 1, channels // 2))).abs().max() < 1e-3:
        raise Wrong("Your frequencies rise from 1 to base. They fall, from 1 to 1/base: the exponent is negative.")
    slowest = sin[min(1, length - 1), -1].asin().item()
    raise Wrong(f"{where}your slowest pair turns by {slowest:.3g} per token, and should by 1/base = {1 / base:.3g}.")


def _near(a, b):
    """As near as float32 has them: angles grow with the position, and so does what they are rounded by."""
    most = (2e-6 + 1e-6 * torch.arange(len(b))).clamp(max=2e-3)[:, None]
    return bool(((a - b).abs() <= most).all())


def rotate(theirs):
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = _tables(5, 8, 100.0)
    try:
        found = theirs(x, cos, sin)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Wrong(f"{error}. The tables are [time, pairs]; x has an axis of heads between: cos[:, None].") from error
    expect_tensor(found, x)
    right = _rotated(x, cos, sin)
    if _same(found, right):
        _quarters(theirs)
        generated(
            lambda shape, turned: _rotates(theirs, shape, turned), most=30,
            shape=st.tuples(*(st.integers(1, 4) for _ in range(4))), turned=st.booleans(),
        )  # fmt: skip
        return
    if _same(found, _rotated(x, cos, -sin)):
        raise Wrong("You turn the other way round: (a·cos + b·sin, −a·sin + b·cos) is a rotation by minus the angle.")
    if _same(found, _rotated(_rotated(x, cos, sin), cos, sin)):
        raise Wrong("You rotate twice.")
    if not _same(found.norm(dim=-1), x.norm(dim=-1)):
        raise Wrong("Your vectors change their length, which a rotation does not. Look at the signs.")
    pairs = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.complex(cos, sin)[:, None])
    if _same(found, pairs.flatten(-2)):
        raise Wrong("You pair neighbours, channels 0 and 1. Here channel c is paired with channel c + channels / 2.")
    raise Wrong(f"Lengths are kept, but the result is up to {(found - right).abs().max().item():.2g} away.")


def _quarters(theirs):
    """By quarters of a turn, which round next to nothing: (a, b) → (a, b), (−b, a), (−a, −b), (b, −a)."""
    x = torch.randn(2, 4, 3, 6, generator=torch.Generator().manual_seed(3))
    cos, sin = (torch.tensor(each)[:, None].expand(4, 3) for each in ([1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]))
    found, (a, b) = theirs(x, cos, sin), x.chunk(2, dim=-1)
    for time, (first, second) in enumerate(((a, b), (-b, a), (-a, -b), (b, -a))):
        right = torch.cat((first, second), dim=-1)[:, time]
        off = (found[:, time] - right).abs().max().item()
        expect(
            rounded_alike(found[:, time], right),
            f"Turned by {time} quarters your result is {off:.2g} off: signs and places change, no number.",
        )


def _rotates(theirs, shape, turned):
    """Any sizes, in memory also by heads; cos and sin are of any table."""
    rows, time, heads, pairs = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, time, heads, 2 * pairs, generator=generator)
    if turned:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    angles = torch.randn(time, pairs, generator=generator)
    where = f"With x of {list(x.shape)}{', a view of [batch, heads, time, channels]' if turned else ''}: "
    found = theirs(x, angles.cos(), angles.sin())
    expect_tensor(found, x, where)
    right = _rotated(x, angles.cos(), angles.sin())
    expect(rounded_alike(found, right, x.abs().max().item()), f"{where}your result is another.")


def rotations(theirs):
    cos, sin = _tables(6, 8, 100.0)
    for seed in range(4):
        q = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(seed))
        turned = q
        for right in range(3):
            found = theirs(q, turned, cos, sin)
            expect(is_whole(found), f"Your function returned {found!r}; 0, 1 or 2 is asked for.")
            if found != right:
                hint = "Its length tells nothing: rotations keep lengths. " if is_whole(found) else ""
                raise Wrong(f"This q was rotated {right} times, and you say {found}. {hint}Compare vectors.")
            turned = _rotated(turned, cos, sin)
    generated(
        lambda right, shape, seed, size: _counts(theirs, right, shape, seed, size), most=40,
        right=st.integers(0, 2), shape=st.tuples(*(st.integers(1, 3) for _ in range(4))), seed=st.integers(0, 99),
        size=st.sampled_from([1.0, 1e-3]),
    )  # fmt: skip


def _counts(theirs, right, shape, seed, size):
    rows, time, heads, pairs = shape
    cos, sin = _tables(time + 1, 2 * pairs, 100.0)
    q = size * torch.randn(rows, time + 1, heads, 2 * pairs, generator=torch.Generator().manual_seed(seed))
    turned = q
    for _ in range(right):
        turned = _rotated(turned, cos, sin)
    found = theirs(q, turned, cos, sin)
    expect(
        found == right,
        f"A q of {list(q.shape)}, of about {size:g}, was rotated {right} times, and you say {found}. Compare vectors.",
    )


def table_bytes(theirs):
    length, channels, layers = 2048, 128, 12
    one = 4 * length * channels // 2
    mistakes = {
        "shared": {
            "There are two tables, cosine and sine.": one,
            "A table has a column for each pair of channels, half as many as channels.": 4 * one,
        },
        "per layer": {
            "That is one pair of tables. Here each layer has its own.": 2 * one,
            "A table has a column for each pair of channels, half as many as channels.": 4 * one * layers,
        },
    }
    right = {"shared": 2 * one, "per layer": 2 * one * layers}
    what = f"{length} positions, {channels} channels a head, {layers} layers, in bytes"
    expect_numbers(theirs(length, channels, layers), right, what, mistakes)
    generated(
        lambda length, pairs, layers: expect_numbers(
            theirs(length, 2 * pairs, layers),
            {"shared": length * pairs * (4 + 4), "per layer": layers * length * pairs * (4 + 4)},
            f"{length} positions, {2 * pairs} channels a head, {layers} layers, in bytes", {},
        ),
        length=st.integers(1, 9999), pairs=st.integers(1, 99), layers=st.integers(1, 99),
    )  # fmt: skip
