"""How fast the kernels were where they ran, and what follows from that: a kernel is used where it pays.

`benchmarks/kernels.py` measures (its table has times and rooflines as well). The rows are of one NVIDIA H100 80GB HBM3
alone on its machine, driver 580.159, torch 2.11.0+cu130, Triton 3.6.0, bf16. Cards, versions and shapes that are not
here go by the nearest row.
"""

import math
from typing import Literal

Kernel = Literal["gram", "polynomial", "linear_relu2", "cross_entropy"]

TIMES_FASTER: dict[Kernel, dict[tuple[int, ...], float]] = {
    # matrices × rows × columns; against torch.bmm
    "gram": {(44, 768, 768): 0.89, (22, 768, 3072): 0.96},
    # matrices × rows × rows; against torch.baddbmm
    "polynomial": {(44, 768, 768): 1.45},
    # tokens × in × out, forward and backward; against torch.compile of the same formula
    "linear_relu2": {(49_152, 768, 3_072): 0.99},
}
"""By how much ours was faster than torch on a shape: torch's time over ours."""

FP8_PRODUCT_TIMES_FASTER = {
    (49_152, 768, 3_072): 0.65,
    (49_152, 3_072, 768): 0.74,
    (49_152, 768, 50_304): 0.69,
}
"""tokens × in × out; against torch._scaled_mm, which therefore multiplies. For the record: no run chooses by it."""

SAVES: dict[Kernel, str] = {
    "linear_relu2": "the MLP's activations before their square: without torch.compile they would be kept for backward",
    "cross_entropy": "the logits, which never exist as a whole",
}
"""What a kernel spares in memory. It is used where it is as fast as torch, or where nobody has measured it."""

AS_FAST = 0.98
"""A share of torch's speed that cannot be told from all of it."""


def pays(kernel: Kernel, shape: tuple[int, ...]) -> bool:
    """Whether ours is to be preferred to torch on this shape: faster on the measured shape nearest in arithmetic, or as
    fast there and sparing memory."""
    rows = TIMES_FASTER.get(kernel, {})
    if not rows:
        return kernel in SAVES
    size = math.log(max(1, math.prod(shape)))
    nearest = min(rows, key=lambda measured: abs(math.log(math.prod(measured)) - size))
    return rows[nearest] > 1.0 or kernel in SAVES and rows[nearest] >= AS_FAST
