"""The softcaps and the multi-token loss, one logit and one target at a time."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from speedrun.config import ModelConfig, ScheduleConfig
from speedrun.model import GPT
from speedrun.model.loss import future_targets, multi_token_loss, softcap
from speedrun.optim.schedule import future_weights
from tests.model.test_gpt import MODERN, START, random_model, random_tokens

CAPS = {
    "tanh 30": (ModelConfig(softcap=30.0), lambda z: 30 * math.tanh(z / 30)),
    "tanh 15": (ModelConfig(softcap=15.0), lambda z: 15 * math.tanh(z / 15)),
    "sigmoid": (ModelConfig(softcap=23.0, softcap_form="sigmoid"), lambda z: 23 / (1 + math.exp(-(z + 5) / 7.5))),
    "none": (ModelConfig(softcap=0.0), lambda z: z),
}


@pytest.mark.parametrize("cap", CAPS)
def test_softcaps_are_their_formulas(cap: str) -> None:
    config, formula = CAPS[cap]
    logits = torch.linspace(-80, 80, 41, dtype=torch.float64, requires_grad=True)
    expected = torch.tensor([formula(z) for z in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(softcap(logits, config), expected)
    assert torch.autograd.gradcheck(lambda z: softcap(z, config), (logits,))
    if cap == "sigmoid":  # the docstring's other form: a tanh about −5, and a constant
        torch.testing.assert_close(expected, 11.5 + 11.5 * torch.tanh((logits.detach() + 5) / 15))


def test_an_asymmetric_softcap_needs_a_size() -> None:
    with pytest.raises(ValueError, match=r"model.softcap_form = sigmoid needs a model.softcap"):
        GPT(ModelConfig(softcap=0.0, softcap_form="sigmoid"))


def brute_force(logits: Tensor, targets: Tensor, weights: tuple[float, ...], document_start: int | None) -> Tensor:
    """Σ over rows, positions and distances, in Python."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, wanted in zip(logits, targets.tolist(), strict=True):
        for i, z in enumerate(row):
            logs = z - z.exp().sum().log()
            count += wanted[i] != -1
            for k, weight in enumerate((1.0, *weights)):
                if i + k < len(wanted) and wanted[i + k] != -1 and document_start not in wanted[i : i + k]:
                    total = total - weight * logs[wanted[i + k]]
    return total / count


@pytest.mark.parametrize("document_start", [None, 0])
@pytest.mark.parametrize("weights", [(0.5,), (0.5, 0.25), (0.0,)])
def test_multi_token_loss_is_its_formula(weights: tuple[float, ...], document_start: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 9, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 4, (3, 9), generator=generator)  # a third of them start a document
    targets[0, 5] = targets[2, 8] = -1
    expected = brute_force(logits, targets, weights, document_start)
    loss = multi_token_loss(logits, targets, weights, document_start, "mean")
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    total = multi_token_loss(logits, targets, weights, document_start, "sum")
    torch.testing.assert_close(total, expected * 25)
    if weights == (0.0,):
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        )


def test_targets_further_on_end_with_row_and_document() -> None:
    targets = torch.tensor([[4, 5, 0, 6, 7, 8]])
    assert future_targets(targets, 1, None).tolist() == [[5, 0, 6, 7, 8, -1]]
    assert future_targets(targets, 1, 0).tolist() == [[5, 0, -1, 7, 8, -1]]
    assert future_targets(targets, 2, 0).tolist() == [[0, -1, -1, 8, -1, -1]]


def test_the_model_adds_them_in_training_only_and_stops_where_its_documents_do() -> None:
    model = random_model(MODERN, START)
    tokens = random_tokens(MODERN)
    targets = tokens.roll(-1, dims=1)
    loss = model(tokens, targets, future_weights=(0.5, 0.25))
    torch.testing.assert_close(loss, brute_force(model(tokens), targets, (0.5, 0.25), START))
    assert torch.equal(model(tokens, targets, future_weights=()), model(tokens, targets))
    model = random_model(dataclasses.replace(MODERN, layers=1), START)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for weights in ((0.5, 0.25), (0.5, 0.2), ()):
        torch.testing.assert_close(
            compiled(tokens, targets, future_weights=weights), model(tokens, targets, future_weights=weights)
        )


def test_weights_fade_one_after_the_other() -> None:
    config = ScheduleConfig(future_weights=(0.5, 0.25))
    steps = [future_weights(config, step, 300) for step in range(300)]
    assert steps[0] == (0.5, 0.25) and steps[50] == pytest.approx((0.5, 0.125))
    assert steps[100] == (0.5,) and steps[150] == pytest.approx((0.25,))
    assert all(step == () for step in steps[200:]) and len(steps[199]) == 1
    assert all(sum(a) >= sum(b) for a, b in pairwise(steps))
    assert future_weights(dataclasses.replace(config, future_weights=()), 0, 300) == ()
    assert [len(future_weights(config, step, 7)) for step in range(7)] == [2, 2, 2, 1, 1, 0, 0]
