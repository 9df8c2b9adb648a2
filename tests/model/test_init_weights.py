"""init_weights: the promised distributions, the same numbers everywhere."""

import dataclasses
import math

import pytest
import torch

from speedrun.config import ModelConfig
from speedrun.model import GPT
from speedrun.presets import PRESETS

MODERN = ModelConfig(layers=2, width=64, heads=2)
TIED = dataclasses.replace(MODERN, tied_head=True)
GPT2 = dataclasses.replace(
    TIED, positions="learned", norm="layer", mlp="gelu", bias=True, qk_norm=False, zero_init_projections=False
)


def weights(config: ModelConfig, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = GPT(config).to(dtype)
    model.init_weights(seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("config", "name", "std"),
    [
        (MODERN, "embed.weight", 1.0),
        (MODERN, "head.weight", 0.005),
        (MODERN, "blocks.1.attention.q.weight", 0.5 / 8),  # 0.5 / √fan_in
        (MODERN, "blocks.1.mlp.up.weight", 0.5 / 8),
        (MODERN, "blocks.1.attention.out.weight", 0.0),
        (MODERN, "blocks.1.mlp.down.weight", 0.0),
        (dataclasses.replace(MODERN, zero_init_projections=False), "blocks.1.attention.out.weight", 0.5 / 8),
        (dataclasses.replace(MODERN, zero_init_projections=False), "blocks.1.mlp.down.weight", 0.5 / 16),
        (TIED, "embed.weight", 0.005),
        (GPT2, "embed.weight", 0.02),
        (GPT2, "positions.weight", 0.02),
        (GPT2, "blocks.1.attention.k.weight", 0.02),
        (GPT2, "blocks.1.attention.k.bias", 0.0),
        (GPT2, "blocks.1.attention.out.weight", 0.02 / 2),  # / √(2 × layers)
        (GPT2, "blocks.1.mlp.down.weight", 0.02 / 2),
    ],
)
def test_each_part_has_its_spread(config: ModelConfig, name: str, std: float) -> None:
    weight = weights(config)[name]
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert abs(weight.mean().item()) <= 4 * std / math.sqrt(weight.numel())


def test_block_matrices_are_uniform_and_layer_norms_start_as_plain_normalisation() -> None:
    q = weights(MODERN)["blocks.0.attention.q.weight"]
    bound = math.sqrt(3) * 0.5 / 8
    assert 0.99 * bound < q.abs().max().item() <= bound
    gpt2 = weights(GPT2)
    assert (gpt2["norm.weight"] == 1).all() and (gpt2["norm.bias"] == 0).all()


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(123)
    first = weights(MODERN, seed=5)
    torch.manual_seed(456)
    again, other = weights(MODERN, seed=5), weights(MODERN, seed=6)
    double = weights(MODERN, seed=5, dtype=torch.float64)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight.double(), double[name])
        assert not weight.any() or not torch.equal(weight, other[name])


def test_a_model_from_the_meta_device_gets_the_same_weights_and_stays_tied() -> None:
    with torch.device("meta"):
        model = GPT(TIED)
    with pytest.raises(ValueError, match="embed.weight is on the meta device"):
        model.init_weights(1)
    model.to_empty(device="cpu").init_weights(1)
    assert model.head.weight is model.embed.weight
    for name, weight in weights(TIED).items():
        assert torch.equal(model.get_parameter(name), weight)
    model(torch.zeros(1, 4, dtype=torch.int64))  # nothing else was left on the meta device


@pytest.mark.parametrize("config", [PRESETS["tiny"][1].model, TIED, GPT2], ids=["tiny", "tied", "gpt2"])
@torch.no_grad()
def test_the_first_loss_is_that_of_a_uniform_guess(config: ModelConfig) -> None:
    model = GPT(config)
    model.init_weights(1)
    tokens = torch.randint(0, 257, (4, 65), generator=torch.Generator().manual_seed(2))
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(257), abs=0.02)
