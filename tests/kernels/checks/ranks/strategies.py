"""The kernels under strategies: FSDP and ZeRO-3 gather weights around modules; the kernels have to find them."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from shardrun.certify.equivalence import Case
from speedrun.model import GPT
from speedrun.optim.policy import parameter_groups
from tests.ranks import RankPool
from tests.strategies.small import forward_backward, make


def train(name: str, kernels: Any, fp8: bool) -> list[float]:
    """The gradient norm before clipping and the loss after a step: they depend on all gradients and weights."""
    config = Case().config()
    model = GPT(dataclasses.replace(config.model, layers=1, kernels=kernels, fp8=fp8), document_start=256)
    model.init_weights(config.seed)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    strategy = make(name)
    optimizer = dataclasses.replace(config.optimizer, orthogonalization_steps=2)
    strategy.prepare(model, parameter_groups(shapes, optimizer, kernels), clip=1.0, accumulation=1)
    forward_backward(strategy, 0)
    norm = float(strategy.step())
    with strategy.evaluation():
        tokens: Tensor = torch.arange(8).view(1, 8)
        return [norm, strategy.model(tokens, tokens).item()]


@pytest.mark.ranks
def test_triton_and_torch_agree_where_weights_are_whole_and_where_they_are_gathered(ranks: RankPool) -> None:
    expected = ranks.run(2, train, "ddp", "torch", False)[0]
    fp8 = ranks.run(2, train, "ddp", "torch", True)[0]
    for name in ("ddp", "fsdp", "zero3"):  # a kernel sees the same under ZeRO-1 and 2 as under DDP
        assert ranks.run(2, train, name, "triton", False)[0] == pytest.approx(expected, rel=1e-3), name
        if name != "ddp":
            assert ranks.run(2, train, name, "triton", True)[0] == pytest.approx(fp8, rel=1e-2), name
    assert fp8[0] != expected[0]
