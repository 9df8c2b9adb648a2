"""Shortcuts of the residual stream: what a block reads beside what the block before it wrote."""

import torch
from torch import Tensor, nn


class EmbeddingSkip(nn.Module):
    """λ·x + μ·x0 before a block: the stream and once more the embedding it began with. λ starts at 1, μ at 0.

    (modded-nanogpt, record 9.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.stream = nn.Parameter(torch.ones(1))
        self.embedding = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        """Both [batch, time, width] → the same shape."""
        return self.stream * x + self.embedding * x0


class Skip(nn.Module):
    """x + s·earlier: the stream as it was at another place, with a learned strength s.

    Blocks joined in the form of a U-net: s starts at 1 (Ronneberger et al. 2015, arXiv 1505.04597; modded-nanogpt,
    record 11). Backout takes a part of a middle layer's stream away before the head: s starts at −0.5 (record 40).
    """

    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        """Both [batch, time, width] → the same shape."""
        return x + self.strength * earlier


class GatedSkip(nn.Module):
    """x + σ(s)·earlier: one block's output into one later block. s starts at −1.5, σ(s) at 0.18. (modded-nanogpt.)"""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((1,), -1.5))

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        """Both [batch, time, width] → the same shape."""
        return x + torch.sigmoid(self.logit) * earlier
