"""The MLP: every position on its own goes up to `mlp_width` channels, through a nonlinearity, and back down."""

import torch.nn.functional as F
from torch import Tensor, nn

from speedrun.config import ModelConfig


class MLP(nn.Module):
    """down(f(up(x))) with f = relu(·)² (So et al. 2021, arXiv 2109.08668) or GELU in its tanh form, as in GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.mlp_width or 4 * config.width
        self.nonlinearity = config.mlp
        self.up = nn.Linear(config.width, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, time, width] → the same shape."""
        hidden = self.up(x)
        hidden = F.relu(hidden).square() if self.nonlinearity == "relu2" else F.gelu(hidden, approximate="tanh")
        return self.down(hidden)
