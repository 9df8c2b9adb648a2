"""Checks of lesson 12."""

import torch

from lessons.checking import Wrong, expect, expect_numbers


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
    length, channels, base = 50, 8, 1024.0
    found = theirs(length, channels, base)
    expect(isinstance(found, tuple) and len(found) == 2, "Two tensors are asked for: (cos, sin).")
    cos, sin = found
    right = _tables(length, channels, base)
    shape = tuple(cos.shape)
    expect(
        shape != (length, channels),
        f"Your table has {channels} columns, one per channel. A pair of channels has one angle: channels / 2 columns.",
    )
    expect(shape == tuple(sin.shape) == (length, channels // 2), f"Your table is {shape}, not [length, channels / 2].")
    if _same(cos, right[0]) and _same(sin, right[1]):
        return
    if _same(cos, right[1]) and _same(sin, right[0]):
        raise Wrong("Cosine and sine are exchanged.")
    if torch.allclose(cos[0], torch.cos(base ** -torch.linspace(0, 1, channels // 2)), atol=1e-4):
        raise Wrong("Your positions count from 1. The first token's is 0: it is not turned at all.")
    if cos.isnan().any() or (cos[1] - torch.cos(base ** torch.linspace(0, 1, channels // 2))).abs().max() < 1e-3:
        raise Wrong("Your frequencies rise from 1 to base. They fall, from 1 to 1/base: the exponent is negative.")
    slowest = sin[1, -1].asin().item()
    raise Wrong(f"Your slowest pair turns by {slowest:.3g} per token, and should by 1/base = {1 / base:.3g}.")


def rotate(theirs):
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = _tables(5, 8, 100.0)
    try:
        found = theirs(x.clone(), cos, sin)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        raise Wrong(f"{error}. The tables are [time, pairs]; x has an axis of heads between: cos[:, None].") from error
    expect(found.shape == x.shape, f"Your result is {tuple(found.shape)} for x of {tuple(x.shape)}.")
    right = _rotated(x, cos, sin)
    if _same(found, right):
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


def rotations(theirs):
    cos, sin = _tables(6, 8, 100.0)
    for seed in range(4):
        q = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(seed))
        turned = q
        for right in range(3):
            found = theirs(q.clone(), turned.clone(), cos, sin)
            expect(isinstance(found, int), f"Your function returned {found!r}; 0, 1 or 2 is asked for.")
            if found != right:
                hint = "Its length tells nothing: rotations keep lengths. " if isinstance(found, int) else ""
                raise Wrong(f"This q was rotated {right} times, and you say {found}. {hint}Compare vectors.")
            turned = _rotated(turned, cos, sin)


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
