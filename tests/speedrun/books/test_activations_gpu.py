"""Predicted activations of a GPU's kernels, without a GPU.

Against what an H100 measured; and against the model on tensors without data that makes CUDA's choices
(strategies/forecast/fake.py, speedrun/books/stand_ins.py), which knows shapes and what each operator saves, but
nothing of the closed form.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import speedrun.kernels.fp8 as fp8
import speedrun.kernels.fp8_linear as fp8_linear
from speedrun.books.activations import predict_activations
from speedrun.books.kernels import Kernels, kernels_on_gpu
from speedrun.books.shapes import shapes_from
from speedrun.books.stand_ins import inside, stand_ins
from speedrun.config import ModelConfig
from speedrun.model import GPT
from speedrun.presets import PRESETS
from strategies.forecast.fake import gpu_kernels
from strategies.ledger.activations import measure_activations
from tests.model.attention_on_cpu import needs_varlen
from tests.speedrun.books.test_activations import CONFIGS

HOPPER = (9, 0)
MEASURED = json.loads((Path(__file__).parents[3] / "benchmarks/gpu_books_measured.json").read_text())


@pytest.mark.parametrize("precision", ("autocast", "bf16"))
def test_an_h100_kept_these_bytes(precision: Any) -> None:
    model = dataclasses.replace(PRESETS["gpt2"][1].model, attention="sdpa")
    predicted = predict_activations(
        model, 8, 1024, precision, documents=True, kernels=kernels_on_gpu(HOPPER, (2, 11), model, "bf16")
    )
    # At that commit a linear layer added its bias inside the product, and autocast kept the casts of all biases.
    biases = 2 * sum(math.prod(s) for n, s in shapes_from(model).items() if "blocks" in n and n.endswith("bias"))
    norms = 2 * model.layers * 2 * model.width
    casts = biases - norms if precision == "autocast" else 0
    assert predicted.total == MEASURED["gpt2"]["activations"][precision] - casts


def simulated(config: ModelConfig, precision: str, kernels: Kernels, rows: int, time: int) -> int:
    """Bytes that autograd keeps, on tensors without data."""
    chosen: Any = "triton" if kernels.triton else "torch"
    with FakeTensorMode(allow_non_fake_inputs=True), stand_ins(kernels).patches(), gpu_kernels(kernels.where.torch):
        torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
        try:
            model = GPT(dataclasses.replace(config, kernels=chosen), document_start=0)
        finally:
            torch.set_default_dtype(torch.float32)
        tokens = torch.zeros(rows, time, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            return measure_activations(model, lambda: model(tokens, tokens)).total


COMBINATIONS = [
    # precision, torch, attention, Triton's kernels, checkpointing
    ("autocast", (2, 11), "sdpa", True, "none"),
    ("autocast", (2, 12), "flex", True, "none"),
    pytest.param("autocast", (2, 12), "varlen", False, "selective", marks=needs_varlen),
    ("bf16", (2, 12), "sdpa", False, "none"),
    pytest.param("bf16", (2, 12), "varlen", True, "block", marks=needs_varlen),
    ("bf16", (2, 12), "flex", True, "none"),
    ("fp32", (2, 12), "flex", False, "none"),
]
A_FEW_NUMBERS = 128
"""Bytes: the loss, a softcap's or a mask's scalars, varlen's offsets."""


@pytest.mark.parametrize(("precision", "version", "attention", "triton", "kind"), COMBINATIONS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_model_keeps_what_is_predicted(
    config: ModelConfig, precision: Any, version: tuple[int, int], attention: Any, triton: bool, kind: Any
) -> None:
    config = dataclasses.replace(config, attention=attention, checkpointing=kind)
    kernels = kernels_on_gpu(HOPPER, version, config, "fp32" if precision == "fp32" else "bf16")
    kernels = dataclasses.replace(kernels, triton=triton)
    predicted = predict_activations(config, 2, 64, precision, documents=True, kernels=kernels)
    assert abs(simulated(config, precision, kernels, 2, 64) - predicted.total) <= A_FEW_NUMBERS, predicted.by_part()


def scaled_mm(a: Tensor, b: Tensor, *scales: Tensor, out_dtype: torch.dtype, use_fast_accum: bool) -> Tensor:
    """torch's knows no tensors without data on a CPU."""
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def held_inside(run: Callable[[], Any]) -> int:
    """Bytes that FP8's operators by plain torch hold inside where they hold most, what they return left out. run: calls
    one of them, without data, as plain functions; what it allocates is counted tensor by tensor."""
    results: list[Any] = []
    with torch.no_grad():
        book = measure_activations(nn.Module(), lambda: results.append(run()))
    returned = [tensor for tensor in results[0] if tensor.numel()] if isinstance(results[0], tuple) else results
    return book.peak - sum(tensor.numel() * tensor.element_size() for tensor in returned)


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    product = fp8.product._init_fn
    for module in (fp8, fp8_linear):
        monkeypatch.setattr(module, "product", product)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield monkeypatch


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_inside_fp8s_layers(without_data: Any, dtype: torch.dtype) -> None:
    x, weight, state = torch.empty(64, 32, dtype=dtype), torch.empty(48, 32, dtype=dtype), torch.zeros(2)
    x8, w8, scale = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn), torch.ones(())
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (fp8.quantize, (x, 0.0, torch.float8_e4m3fn, False, "scaled_mm")),
        (fp8.quantize_delayed, (x, state, 1.5, 16, torch.float8_e4m3fn, "scaled_mm")),
        (fp8_linear.linear, (x, weight, x8, w8, scale, scale, True, "scaled_mm")),
        (fp8_linear.linear, (x, weight, x8, w8, scale, scale, False, "scaled_mm")),
    ]
    for operator, arguments in calls:
        name = operator._opoverload._schema.name.rpartition("::")[2]
        # Where the largest moment comes before the results exist, they are not added to it.
        least = held_inside(lambda operator=operator, arguments=arguments: operator._init_fn(*arguments))
        expected = sum(inside(name, arguments))
        assert 0 <= expected - least <= x.numel() + A_FEW_NUMBERS, (name, expected, least)
        assert not inside(name, (*arguments[:-1], "emulated"))


@pytest.mark.parametrize("tokens", (64, 128, 200, 256))
@pytest.mark.parametrize("vocabulary", (128, 512))
def test_inside_the_fused_loss_in_fp8(without_data: Any, tokens: int, vocabulary: int) -> None:
    pytest.importorskip("triton")
    import speedrun.books.activations as activations
    import speedrun.kernels.cross_entropy as fused

    without_data.setattr(fused, "ROWS", 128)
    without_data.setattr(activations, "LOSS_ROWS", 128)
    without_data.setattr(fused, "way", lambda kernels, device: "scaled_mm")
    without_data.setattr(fused, "quantize", fp8.quantize._init_fn)
    without_data.setattr(fused, "product", fp8.product)
    without_data.setattr(fused, "_losses", lambda logits, *_, **__: logits.new_empty(len(logits), dtype=torch.float32))
    hidden, targets = torch.empty(tokens, 32, dtype=torch.bfloat16), torch.zeros(tokens, 1, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (hidden, torch.empty(vocabulary, 32, dtype=dtype), targets, [1.0], 100, 0.0, "tanh", True, True)
        held = held_inside(lambda arguments=arguments: fused.loss_and_gradients._init_fn(*arguments))
        assert abs(held - sum(inside("cross_entropy_and_gradients", arguments))) <= A_FEW_NUMBERS
