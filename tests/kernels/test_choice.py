"""Who computes: `model.kernels` resolved, and its reasons."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speedrun import kernels
from speedrun.config import ModelConfig
from speedrun.kernels import choose, fp8, use_triton
from speedrun.kernels.measured import TIMES_FASTER, pays
from speedrun.model import GPT
from speedrun.wiring import check_fp8

ANY = ("polynomial", (1, 8, 8))
"""A kernel, and a product that it is good for."""


def test_auto_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INSTALLED", True)
    assert choose("auto", "cpu", "bf16")[0] == "torch" and "cpu" in choose("auto", "cpu", "bf16")[1]
    assert choose("auto", "cuda", "fp32") == ("torch", "the run computes in fp32 and the kernels pay in bf16")
    assert choose("auto", "cuda", "bf16")[0] == "triton" and choose("triton", "cuda", "fp32")[0] == "triton"
    assert choose("auto", "cuda", "fp16") == (
        "torch",
        "the run computes in fp16, and the fused loss makes its gradients before the loss scale lifts them",
    )
    with pytest.raises(ValueError, match="model.kernels is triton, but the run computes in fp16"):
        choose("triton", "cuda", "fp16")
    assert choose("torch", "cuda", "bf16") == ("torch", "as asked")
    monkeypatch.setattr(kernels, "INSTALLED", False)
    assert choose("auto", "cuda", "bf16") == ("torch", "Triton is not installed")


def test_triton_where_it_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="model.kernels is triton, but the run computes on cpu"):
        choose("triton", "cpu", "bf16")
    with pytest.raises(ValueError, match="model.kernels is triton, but"):
        use_triton("triton", torch.zeros(1), *ANY)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with pytest.raises(ValueError, match="float64"):
        use_triton("triton", torch.zeros(1, dtype=torch.float64), *ANY)
    monkeypatch.setattr(kernels, "INSTALLED", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        choose("triton", "cuda", "bf16")
    assert not use_triton("auto", torch.zeros(1), *ANY) and not use_triton("torch", torch.zeros(1), *ANY)


def test_a_kernel_is_taken_where_it_pays() -> None:
    assert not pays("gram", (44, 768, 768)) and not pays("gram", (22, 768, 3072)) and not pays("gram", (1, 64, 64))
    assert pays("polynomial", (44, 768, 768)) and pays("polynomial", (1, 64, 64))
    assert pays("linear_relu2", (49_152, 768, 3072))  # no faster, but it spares memory
    assert pays("cross_entropy", (49_152, 768, 50_304))  # not measured; it spares the logits


def test_the_nearest_measured_shape_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TIMES_FASTER, "gram", {(1, 64, 64): 1.3, (44, 768, 768): 0.9})
    assert pays("gram", (2, 64, 64)) and not pays("gram", (20, 768, 768))
    monkeypatch.setitem(TIMES_FASTER, "linear_relu2", {(8, 8, 8): 0.9})
    assert not pays("linear_relu2", (8, 8, 8))


def test_who_computes_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a GPU takes torch._scaled_mm, whatever model.kernels says, or is refused in a sentence."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert {fp8.way(asked, cuda) for asked in ("auto", "triton", "torch")} == {"scaled_mm"}
    assert "not seen on a GPU yet" in fp8.in_words("triton", cpu=False)
    assert fp8.way("auto", cpu) == fp8.way("torch", cpu) == "emulated"
    with pytest.raises(ValueError, match="model.fp8 is on, but this GPU has compute capability 8.0"):
        check_fp8(ModelConfig(fp8=True), "bf16", (8, 0))
    monkeypatch.setattr(fp8, "INTERPRETED", True)
    assert fp8.way("triton", cpu) == "triton" and fp8.way("torch", cpu) == "emulated"


def test_on_a_cpu_auto_is_torch_to_the_bit() -> None:
    losses = []
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    for asked in ("auto", "torch"):
        model = GPT(ModelConfig(vocab_size=50, layers=2, heads=2, width=16, kernels=asked))  # type: ignore[arg-type]
        model.init_weights(1)
        losses.append(model(tokens, tokens))
        losses[-1].backward()
    assert torch.equal(*losses)


def test_a_model_on_a_cpu_loads_no_triton() -> None:
    code = (
        "import sys, torch; from speedrun.config import ModelConfig; from speedrun.model import GPT; "
        "import speedrun.optim.rules, speedrun.kernels.fp8_linear; "
        "model = GPT(ModelConfig()); tokens = torch.zeros(1, 4, dtype=torch.long); "
        "model(tokens, tokens).backward(); print('triton' in sys.modules)"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr
