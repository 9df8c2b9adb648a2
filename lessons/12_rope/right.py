"""Other right solutions of lesson 12, differently built: the check must pass them."""

import torch

from lessons.checking import right_attempt


@right_attempt("tables")
def by_outer(length, channels, base):
    pairs = channels // 2
    exponents = torch.tensor([-i / max(1, pairs - 1) for i in range(pairs)])
    angles = torch.outer(torch.arange(length, dtype=torch.float32), torch.pow(torch.tensor(base), exponents))
    return torch.cos(angles), torch.sin(angles)


@right_attempt("rotate")
def by_complex_numbers(x, cos, sin):
    pairs = torch.stack(x.chunk(2, dim=-1), dim=-1).contiguous()
    turned = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@right_attempt("rotations")
def by_angle(q, q_rotated, cos, sin):
    def turned(x):
        return by_complex_numbers(x, cos, sin)

    candidates = [q, turned(q), turned(turned(q))]
    for count, candidate in enumerate(candidates):
        if torch.allclose(candidate, q_rotated, atol=1e-3):
            return count
    return 2
