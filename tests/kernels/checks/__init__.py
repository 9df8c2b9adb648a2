"""Checks of the Triton kernels against float64, which tests/kernels/test_kernels.py runs in a process of their own.

By hand: TRITON_INTERPRET=1 pytest tests/kernels/checks/relu2.py. The interpreter has to be asked for before Triton is
imported; without it the same checks run on the GPU. Where it is known to part from the hardware:

- float32 → bfloat16 cuts off in place of rounding to nearest: twice the rounding error (`rounding`);
- float32 → FP8 cuts off or, in newer versions, rounds without carrying into the exponent (checks/fp8.py);
- NaN becomes a number in e4m3, and FP8's NaN is multiplied as one: here NaN passes by the scale alone.
"""

import torch
from torch import Tensor

from speedrun.kernels import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normally distributed, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of rounding a float32 to `dtype`, and of a few float32 operations before that."""
    return 2.0**-7 if dtype == torch.bfloat16 and INTERPRETED else 2.0**-8 if dtype == torch.bfloat16 else 2.0**-21


def assert_close(result: Tensor, exact: Tensor, magnitude: Tensor | float = 0.0, terms: int = 1) -> None:
    """|result − exact| ≤ rounding·|exact| + terms·2⁻²³·magnitude: rounding of a result that was added up in float32
    from so many terms of that magnitude altogether."""
    assert result.shape == exact.shape
    bound = rounding(result.dtype) * exact.abs() + terms * 2.0**-23 * magnitude + 1e-37
    error = (result.double() - exact).abs()
    assert bool((error <= bound).all()), f"off by {error.max():.3g}, {(error / bound).max():.3g} times the bound"
