"""The GPT with `kernels` triton against the GPT with torch: loss, gradients, checkpointing, FP8."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from speedrun.config import ModelConfig
from speedrun.model import GPT
from tests.kernels.checks import DEVICE

CONFIG = ModelConfig(
    vocab_size=50, pad_vocab_to=8, layers=2, heads=2, width=16, mlp_width=40, max_sequence_length=16,
    zero_init_projections=False,
)  # fmt: skip


def run(
    low: bool = False, reduction: Any = "mean", future: tuple[float, ...] = (), **changes: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    model = GPT(dataclasses.replace(CONFIG, **changes), document_start=7)
    model.init_weights(1)
    model.to(DEVICE)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    with torch.autocast(DEVICE, torch.bfloat16, enabled=low):
        loss = model(tokens, targets, reduction, future)
    (2 * loss).backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_near(
    got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], tolerance: float
) -> None:
    assert abs(got[0] - want[0]) <= tolerance * abs(want[0])
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert got[1][name].dtype == gradient.dtype
        assert (got[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("changes", ({}, {"tied_head": True, "softcap": 0.0}, {"mlp": "gelu", "bias": True}))
def test_in_float32(changes: dict[str, Any]) -> None:
    assert_near(run(kernels="triton", **changes), run(kernels="torch", **changes), 1e-4)


@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_the_records_loss_is_fused_too(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The softcap's sigmoid form and several tokens to come: what `speedrun` trains with. No logits are made."""
    loss = dict(reduction=reduction, future=(0.5, 0.25), softcap=23.0, softcap_form="sigmoid")
    want = run(kernels="torch", **loss)
    monkeypatch.setattr(GPT, "_readable", None)
    assert_near(run(kernels="triton", **loss), want, 1e-4)


def test_under_autocast() -> None:
    assert_near(run(low=True, kernels="triton"), run(low=True, kernels="torch"), 0.06)


@pytest.mark.parametrize(("checkpointing", "fp8"), (("block", True), ("selective", False)))
def test_checkpointing_changes_nothing(checkpointing: str, fp8: bool) -> None:
    plain, again = (run(kernels="triton", fp8=fp8, checkpointing=c) for c in ("none", checkpointing))
    assert_near(again, plain, 0.0)


def test_fp8_is_near() -> None:
    assert_near(run(low=True, kernels="triton", fp8=True), run(low=True, kernels="torch"), 0.3)


def test_compiled_it_is_one_graph() -> None:
    config = dataclasses.replace(CONFIG, layers=1, kernels="triton", fp8=True)
    model = GPT(config)
    model.init_weights(1)
    model.to(DEVICE)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    losses = [model(tokens, tokens) for _ in range(2)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for block in model.blocks:
        block.mlp.down.scales = type(block.mlp.down.scales)()
    again = [compiled(tokens, tokens) for _ in range(2)]
    assert [loss.item() for loss in again] == pytest.approx([loss.item() for loss in losses], rel=1e-4)
    again[1].backward()
    assert all(p.grad is not None for p in model.parameters())
