"""Which attention function computes softmax(scale · q·kᵀ)·v, and why. No torch in here: plans ask too.

sdpa    torch's scaled_dot_product_attention with a boolean mask: everywhere, but every pair is looked at
flex    FlexAttention, compiled for a block mask: skips blocks that no one sees
varlen  torch's own variable-length attention: gets documents as lengths, 16 bit only
flash   FlashAttention-3 from the package flash_attn_interface, lengths too: Hopper GPUs

They compute the same up to rounding (speedrun/model/attend.py); `auto` takes the one that was fastest when measured.
"""

import math
from dataclasses import dataclass
from typing import Literal

from strategies.errors import UserError

Kind = Literal["sdpa", "flex", "varlen", "flash"]


@dataclass(frozen=True)
class Where:
    """What the queries are computed on."""

    device: str
    """cpu or cuda."""
    capability: tuple[int, int]
    """CUDA's compute capability of the card; (0, 0) on a CPU."""
    torch: tuple[int, int]
    """Its version."""
    sixteen_bit: bool
    """The queries are bfloat16 or float16."""
    flash: bool = False
    """flash_attn_interface.flash_attn_varlen_func can be imported."""


@dataclass(frozen=True)
class Measured:
    """Milliseconds of attention alone, forward and backward, by function."""

    rows: int
    length: int
    heads: int
    window: int
    """As in `choose_attention`."""
    milliseconds: dict[Kind, float]


MEASURED = (
    Measured(16, 1024, 6, 128, {"varlen": 0.74, "sdpa": 0.77, "flex": 0.98}),
    Measured(24, 2048, 6, 768, {"flex": 1.27, "varlen": 1.92, "sdpa": 3.90}),
)
"""One H100 80GB HBM3 (536 TFLOP/s in an 8192³ bf16 product, so not the quickest), torch 2.11.0, bfloat16, heads of 128
channels, documents of about 600 tokens, sdpa with a dense mask, varlen on FlashAttention-2. Two rows are all there is:
other cards, head sizes and lengths of documents go by them too, and FlashAttention-3 has none, so `auto` never takes
`flash` by itself."""


def choose_attention(asked: str, where: Where, window: int, length: int) -> tuple[Kind, str]:
    """The attention function for queries that see `window` positions back in rows of `length`, and why.

    asked: model.attention; window: 0 for no limit. Both count the positions that the function gets, which in a layer
    of paired heads are two per token.

    `auto` follows `MEASURED`: the row whose window is nearest (by ratio; a query without a window sees its row), and of
    that row the fastest function that can run here. Between the two windows of the table nobody has measured where one
    function overtakes the other: the border at their geometric mean, 314, is a guess.

    Raises ValueError where what was asked for cannot run.
    """
    if asked != "auto":
        for kind in KINDS:
            if asked == kind:
                if hindrance := _hindrance(kind, where):
                    raise UserError(f"model.attention = {asked} cannot run: {hindrance}; use auto or sdpa")
                return kind, "model.attention asks for it"
        raise UserError(f"model.attention = {asked} is none of auto, {', '.join(KINDS)}")
    if where.device != "cuda":
        return "sdpa", f"on {where.device} the others have no kernel, or none for the backward pass"
    span = min(window or length, length)
    row = min(MEASURED, key=lambda row: abs(math.log(span / row.window)))
    ranked = sorted(row.milliseconds, key=lambda kind: row.milliseconds[kind])
    chosen = next(kind for kind in ranked if not _hindrance(kind, where))
    times = ", ".join(f"{kind} {row.milliseconds[kind]:.2f}" for kind in ranked)
    passed_over = "".join(f"; no {kind}: {_hindrance(kind, where)}" for kind in ranked[: ranked.index(chosen)])
    return chosen, f"the nearest measured window, {row.window}, took {times} ms on an H100{passed_over}"


KINDS: tuple[Kind, ...] = ("sdpa", "flex", "varlen", "flash")


def _hindrance(kind: Kind, where: Where) -> str:
    """Why this function cannot run there, or nothing."""
    if kind == "sdpa":
        return ""
    if where.device != "cuda":
        return f"it needs a CUDA GPU, and this is {where.device}"
    this = "this GPU has {}.{}".format(*where.capability)
    if kind == "flex":  # compiled to Triton
        return "" if where.capability >= (7, 0) else f"it needs compute capability 7.0, and {this}"
    if not where.sixteen_bit:
        return "it takes queries of 16 bits, and these have more"
    if kind == "varlen":
        if where.torch < (2, 11):
            return "it has windows from torch 2.11 on, and this is {}.{}".format(*where.torch)
        return "" if where.capability >= (8, 0) else f"it needs compute capability 8.0, and {this}"
    if where.capability[0] != 9:
        return f"FlashAttention-3 is for Hopper GPUs, of compute capability 9.0, and {this}"
    return "" if where.flash else "flash_attn_interface.flash_attn_varlen_func cannot be imported"
