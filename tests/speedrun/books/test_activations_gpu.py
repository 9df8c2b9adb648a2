"""Predicted activations of a GPU's kernels, without a GPU.

Against what an H100 measured; and against the model on tensors without data that makes CUDA's choices
(strategies/forecast/fake.py, speedrun/books/stand_ins.py), which knows shapes and what each operator saves, but
nothing of the closed form.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from speedrun.books.activations import predict_activations
from speedrun.books.kernels import Kernels, kernels_on_gpu
from speedrun.books.shapes import shapes_from
from speedrun.books.stand_ins import stand_ins
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
