"""The MLP: every position on its own goes up to `mlp_width` channels, through a nonlinearity, and back down."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun.config import ModelConfig
from speedrun.kernels import use_triton
from speedrun.kernels.fp8_linear import DelayedScales, mlp_down, mlp_up
from speedrun.model.linear import Linear


class MLP(nn.Module):
    """down(f(up(x))) with f = relu(·)² (So et al. 2021, arXiv 2109.08668) or GELU in its tanh form, as in GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.mlp_width or 4 * config.width
        self.nonlinearity = config.mlp
        self.up = Up(config, config.width, hidden)
        self.down = Down(config, hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, time, width] → the same shape."""
        hidden = self.up(x)
        if not self.up.squares(x):
            hidden = relu2(hidden) if self.nonlinearity == "relu2" else F.gelu(hidden, approximate="tanh")
        return self.down(hidden)


def relu2(x: Tensor) -> Tensor:
    """relu(x)², of x's shape. Under autocast torch's own functions, which square in float32 on a GPU."""
    if torch.is_autocast_enabled(x.device.type):
        return F.relu(x).square()
    return ReLU2.apply(x)  # type: ignore[no-any-return]


class ReLU2(torch.autograd.Function):
    """relu(x)² with the gradient 2·g·relu(x) in one pass; torch's own takes a power, two products and a threshold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Keeps relu(x)."""
        relu = F.relu(x)
        ctx.save_for_backward(relu)
        return relu.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """0 where x is 0 or less."""
        (relu,) = ctx.saved_tensors
        return torch.addcmul(relu.new_zeros(()), gradient, relu, value=2)


class Up(Linear):
    """The linear layer up; where kernels allow it, its squared ReLU at once (`squares`).

    A module and not a function of the weight, because FSDP and ZeRO-3 gather weights when their module is called.
    """

    def __init__(self, config: ModelConfig, width: int, hidden: int) -> None:
        super().__init__(width, hidden, bias=config.bias)
        self.kernels, self.fp8, self.relu2 = config.kernels, config.fp8, config.mlp == "relu2" and not config.bias

    def squares(self, x: Tensor) -> bool:
        """Whether the forward pass of x ends behind the nonlinearity."""
        if not self.relu2:
            return False
        shape = (x.shape[:-1].numel(), self.in_features, self.out_features)
        return self.fp8 and torch.is_grad_enabled() or use_triton(self.kernels, x, "linear_relu2", shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] → [..., hidden]."""
        if self.fp8 and torch.is_grad_enabled():  # validation is not in FP8
            return mlp_up(x, self.weight, self.relu2, self.kernels)
        if self.squares(x):
            from speedrun.kernels.relu2 import linear_relu2

            return linear_relu2(x, self.weight)
        return super().forward(x)


class Down(Linear):
    """The linear layer down, with delayed scales where it is in FP8."""

    def __init__(self, config: ModelConfig, hidden: int, width: int) -> None:
        super().__init__(hidden, width, bias=config.bias)
        self.kernels = config.kernels
        self.scales = DelayedScales() if config.fp8 else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] → [..., width]."""
        if self.scales is not None and torch.is_grad_enabled():  # validation is not in FP8
            return mlp_down(x, self.weight, self.scales, self.kernels)
        return super().forward(x)
