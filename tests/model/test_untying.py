"""Late untying: a tied model until then, two independent weights with equal optimizer states from then on."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from speedrun.config import ModelConfig
from speedrun.model import GPT

TIED = ModelConfig(vocab_size=31, layers=2, heads=2, width=32, mlp_width=48, tied_head=True)
LATE = dataclasses.replace(TIED, untie_at=0.5)


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 31, (3, 13), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def train(config: ModelConfig, steps: int, untied_from: int = 10**9) -> tuple[GPT, torch.optim.AdamW]:
    model = GPT(config, document_start=0)
    model.init_weights(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        options = {"tied": step < untied_from} if config.untie_at else {}
        model(*batch(step), **options).backward()
        optimizer.step()
    return model, optimizer


def test_until_then_it_is_the_tied_model_bit_for_bit_and_both_weights_are_one() -> None:
    tied, tied_optimizer = train(TIED, 6)
    late, optimizer = train(LATE, 6)
    first, second = late.get_parameter("embed.weight"), late.get_parameter("embed.head")
    for name, parameter in tied.named_parameters():
        assert torch.equal(late.get_parameter(name), parameter), name
    for parameter in (first, second):
        assert torch.equal(parameter, tied.get_parameter("embed.weight"))
        assert torch.equal(parameter.grad, tied.get_parameter("embed.weight").grad)  # type: ignore[arg-type]
        expected = tied_optimizer.state[tied.get_parameter("embed.weight")]
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[parameter][key], expected[key])
    with torch.no_grad():
        assert torch.equal(late(*batch(9)), tied(*batch(9)))  # an evaluation, which is told nothing


def test_from_then_on_it_is_an_untied_model_with_the_tied_ones_state() -> None:
    """The reference splits a tied model by hand: it copies weight and optimizer state into an untied model."""
    tied, tied_optimizer = train(TIED, 4)
    untied = GPT(dataclasses.replace(TIED, tied_head=False), document_start=0)
    optimizer = torch.optim.AdamW(untied.parameters(), lr=0.01, weight_decay=0.1)
    for name, parameter in untied.named_parameters():
        source = tied.get_parameter("embed.weight" if name == "head.weight" else name)
        parameter.data.copy_(source)
        optimizer.state[parameter] = {key: value.clone() for key, value in tied_optimizer.state[source].items()}
    for step in range(4, 8):
        optimizer.zero_grad()
        untied(*batch(step)).backward()
        optimizer.step()
    late, _ = train(LATE, 8, untied_from=4)
    for name, parameter in late.named_parameters():
        expected = untied.get_parameter("head.weight" if name == "embed.head" else name)
        assert torch.equal(parameter, expected), name
    assert not torch.equal(late.get_parameter("embed.weight"), late.get_parameter("embed.head"))


def test_gradients_equal_finite_differences_once_untied() -> None:
    model = GPT(dataclasses.replace(LATE, vocab_size=5, width=8, layers=1, mlp_width=4)).double()
    names, parameters = zip(*model.named_parameters(), strict=True)
    tokens = torch.tensor([[1, 3, 2, 0, 4]])

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tokens, tokens))

    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)


def test_a_model_from_the_meta_device_starts_alike() -> None:
    with torch.device("meta"):
        model = GPT(LATE)
    model.to_empty(device="cpu").init_weights(1)
    tied = GPT(TIED)
    tied.init_weights(1)
    for name in ("embed.weight", "embed.head"):
        assert torch.equal(model.get_parameter(name), tied.get_parameter("embed.weight"))
    model(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(tied_head=False), r"model.untie_at = 0.5 .* model.tied_head = False"),
        (dict(untie_at=1.5), r"model.untie_at is 1.5,"),
    ],
)
def test_conflicts_are_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GPT(dataclasses.replace(LATE, **changes))
