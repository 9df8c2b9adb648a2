"""Normalisation: RMSNorm without weights, or LayerNorm with weight and bias."""

import torch.nn.functional as F
from torch import Tensor, nn

from speedrun.config import ModelConfig

EPS = 1e-6
"""Added to the mean square. Spelled out because torch's default is the epsilon of the input's dtype: another number,
and so another function, in bfloat16 than in float32."""


def rms_norm(x: Tensor) -> Tensor:
    """x / √(mean(x²) + EPS) over the last dimension: every vector gets length √channels; shape and dtype stay.

    No weights: the linear layer that follows can scale its input itself. (Zhang and Sennrich 2019, arXiv 1910.07467.)
    """
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


class RMSNorm(nn.Module):
    """`rms_norm` as a module: a named place in the model without any parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x)


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation of the residual stream, [..., width] → the same, that `config.norm` asks for."""
    return RMSNorm() if config.norm == "rms" else nn.LayerNorm(config.width)
