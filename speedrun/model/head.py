"""The output head: hidden states to logits, or straight to the loss.

Modules and not functions of the weight, because FSDP and ZeRO-3 gather weights when their module is called.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun.config import ModelConfig
from speedrun.kernels import fp8_linear

Reduction = Literal["mean", "sum"]


class Head(nn.Linear):
    """A linear layer without bias from width to padded vocabulary, in FP8 where `fp8` asks for it (training only)."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__(config.width, rows, bias=False)
        self.config = config

    def forward(
        self, x: Tensor, targets: Tensor | None = None, reduction: Reduction = "mean", future: tuple[float, ...] = ()
    ) -> Tensor:
        """x [..., width] → [..., rows] as the product gives them; with targets [...] the softcapped cross-entropy, or
        with targets [..., 1 + len(future)] that of several tokens to come (`multi_token_loss`)."""
        return _project(self.config, x, self.weight, targets, reduction, future)


class GivenHead(nn.Module):
    """The head where its weight belongs to another module."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        targets: Tensor | None = None,
        reduction: Reduction = "mean",
        future: tuple[float, ...] = (),
    ) -> Tensor:
        """As `Head`, with its weight [rows, width]."""
        return _project(self.config, x, weight, targets, reduction, future)


def _project(
    config: ModelConfig,
    x: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    reduction: Reduction,
    future: tuple[float, ...],
) -> Tensor:
    if targets is not None:
        from speedrun.kernels.cross_entropy import cross_entropy

        cap, form = config.softcap, config.softcap_form
        return cross_entropy(x, weight, targets, config.vocab_size, cap, reduction, config.fp8, form, future)
    if config.fp8 and torch.is_grad_enabled():  # validation is not in FP8
        return fp8_linear.head(x, weight, config.kernels)
    return F.linear(x, weight)
