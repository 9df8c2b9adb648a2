"""FP8's two formats, and what a quantised matrix is."""

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
SMALLEST_SCALE = 1e-30
"""Keeps 1 / scale finite for a tensor of zeros, or of numbers so small that FP8 is not for them."""
Quantized = tuple[Tensor, Tensor, Tensor]
"""q [rows, columns]; its transpose [columns, rows], contiguous (empty where not asked for); the scale, a scalar."""


def transposed(q: Tensor, wanted: bool) -> Tensor:
    """qᵀ, contiguous, or an empty tensor where it is not wanted. A copy even of a single row, whose transpose is the
    same memory: an operator's outputs share none."""
    return q.mT.clone(memory_format=torch.contiguous_format) if wanted else q.new_empty(0)
