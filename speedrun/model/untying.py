"""Head and embedding tied at first and untied later, without anything to copy, gather or reshard on the way.

There are two parameters all along, equal at the start. While they are tied the model reads the first for both uses, and
backward gives *each* the sum of both uses' gradients. Equal weights with equal gradients, options and optimizer states
stay equal; from the untying on each is read for its own use and gets its own gradient, and goes on from its own state,
which is a copy of the other's. (modded-nanogpt, record 53, copies weight and state at two thirds of the run.)

The price: a second table with its gradient and state from the start, and while tied the gradient's norm, by which
clipping goes, counts the pair twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Tied(torch.autograd.Function):
    """(a, b) → (a, a), with the sum of both gradients for each."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first.view_as(first), first.view_as(first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        total = gradients[0] + gradients[1]
        return total, total.clone()


class UntyingEmbedding(nn.Module):
    """A token embedding that owns the head's weight too: engines gather parameters module by module."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width).normal_())
        self.head = nn.Parameter(torch.empty(rows, width).normal_())

    def forward(self, tokens: Tensor, tied: bool) -> tuple[Tensor, Tensor]:
        """tokens int64 [batch, time] → their vectors [batch, time, width], and the head's weight [rows, width]."""
        embedding, head = _Tied.apply(self.weight, self.head) if tied else (self.weight, self.head)
        return F.embedding(tokens, embedding), head.view_as(head)
