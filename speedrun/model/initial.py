"""How every parameter begins: one function for a whole parameter and for any part of it."""

import math

import torch
from torch import Tensor

from speedrun.config import ModelConfig
from speedrun.model.random_stream import normal, uniform

CONSTANT_STARTS = {
    ".table.weight": 0.0,
    ".gate.weight": 0.0,
    ".scale": 1.0,
    "smear.strength": 0.0,
    "embedding_skip.stream": 1.0,
    "embedding_skip.embedding": 0.0,
    "skip.strength": 1.0,
    "skip.logit": -1.5,
    "backout.strength": -0.5,
}
"""How the parameters of features start."""


def initial_values(config: ModelConfig, seed: int, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a parameter as it begins, of its flattened `shape`: float32 [stop − start], on the CPU.

    The numbers are a function of seed, name and position (speedrun/model/random_stream.py): the same on every rank and
    device, in any dtype that they are rounded to, and in any part. So no rank needs a whole parameter to begin with.
    """

    def constant(value: float) -> Tensor:
        return torch.full((stop - start,), value, device="cpu")

    projection = name.endswith((".out.weight", ".down.weight"))  # writes to the residual stream
    constants = (value for ending, value in CONSTANT_STARTS.items() if name.endswith(ending))
    if (value := next(constants, None)) is not None:
        return constant(value)
    if name.endswith("grams.up.weight"):  # the identity
        positions = torch.arange(start, stop, device="cpu")
        return (positions // shape[1] == positions % shape[1]).float()
    if name.endswith(".bias"):
        return constant(0.0)
    if len(shape) == 1:  # LayerNorm
        return constant(1.0)
    if name == "head.weight":  # nearly equal logits: the first loss is ln(vocab_size)
        return normal(seed, name, start, stop, 0.005)
    if name in ("embed.weight", "embed.head", "positions.weight"):
        drawn = "embed.weight" if name == "embed.head" else name  # tied at first: equal
        if config.norm == "layer":
            return normal(seed, drawn, start, stop, 0.02)
        # RMSNorm follows, so only a head that is the same tensor minds the scale
        return normal(seed, drawn, start, stop, 0.005 if config.tied_head else 1.0)
    if name.endswith("gate.weight"):  # a sigmoid of zero: every gate starts half open
        return constant(0.0)
    if projection and config.zero_init_projections:
        return constant(0.0)
    if config.norm == "layer" and not config.zero_init_projections:  # GPT-2
        # 2 × layers projections add up in the stream
        return normal(seed, name, start, stop, 0.02 / math.sqrt(2 * config.layers) if projection else 0.02)
    return uniform(seed, name, start, stop, math.sqrt(3) * 0.5 / math.sqrt(shape[1]))
