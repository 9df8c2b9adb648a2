"""Orthogonalisation: the nearest (semi-)orthogonal matrix, by matrix products alone.

For a matrix G = U S Vᵀ both functions return approximately U Vᵀ: the singular vectors stay, the singular values go
towards one. They work by an odd polynomial of X = G / ‖G‖, applied again and again, because a polynomial a·X + b·XXᵀX +
c·(XXᵀ)²X acts on the singular values alone: s → a·s + b·s³ + c·s⁵. No iteration needs a factorisation, so all of it
runs at the speed of matrix products.

Sources: Newton–Schulz quintic: Keller Jordan, "Muon: an optimizer for hidden layers" (2024). Polar Express:
Amsel, Persson, Musco, Gower, "The Polar Express" (2025), arXiv 2505.16932.
"""

import torch
from torch import Tensor

from speedrun.config import Kernels
from speedrun.kernels import use_triton

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""One quintic for every iteration. Five of them bring singular values of a normalised matrix into [0.47, 1.21]: it
overshoots on purpose, because a steep slope at zero matters more than ending at exactly one."""

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""A quintic per iteration, each the best one for the interval that the one before leaves. Singular values of at least
0.001 end in [0.847, 1.141]. After the fifth, the fifth is repeated."""


def newton_schulz(
    matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16, kernels: Kernels = "torch"
) -> Tensor:
    """Orthogonalise by Newton–Schulz iteration.

    matrices: [n, rows, columns], any float dtype. Products are taken in `dtype`; the result has the input's dtype.
    kernels: who computes the symmetric products (see `ModelConfig`). A zero matrix stays zero.
    """
    quintics = [NEWTON_SCHULZ] * steps
    return _iterate(matrices, quintics, dtype, kernels, norm_factor=1.0, norm_offset=1e-7)


def polar_express(
    matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16, kernels: Kernels = "torch"
) -> Tensor:
    """Orthogonalise by Polar Express. Arguments as `newton_schulz`."""
    quintics = [POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)] for i in range(steps)]
    # The factor keeps rounding from lifting a singular value above one, where these polynomials grow fast.
    return _iterate(matrices, quintics, dtype, kernels, norm_factor=1.02, norm_offset=1e-6)


def _iterate(
    matrices: Tensor,
    quintics: list[tuple[float, float, float]],
    dtype: torch.dtype,
    kernels: Kernels,
    norm_factor: float,
    norm_offset: float,
) -> Tensor:
    # The Frobenius norm bounds the spectral norm, so that every singular value starts within [0, 1].
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = (matrices / (norm * norm_factor + norm_offset)).to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # XXᵀ has the shorter side's size when the matrix lies on its long side: smaller products
        x = x.mT
    count, rows, columns = x.shape
    our_gram = use_triton(kernels, x, "gram", (count, rows, columns))
    our_polynomial = use_triton(kernels, x, "polynomial", (count, rows, rows))
    if our_gram or our_polynomial:
        from speedrun.kernels import symmetric
    for a, b, c in quintics:
        gram = symmetric.gram(x) if our_gram else torch.bmm(x, x.mT)
        if our_polynomial:
            polynomial = symmetric.polynomial(gram, b, c)
        else:
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b·A + c·A²
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a·X + (b·A + c·A²)·X
    if tall:
        x = x.mT
    return x.to(matrices.dtype)
