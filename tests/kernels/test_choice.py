"""Who computes: `model.kernels` resolved, and its reasons."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speedrun import kernels
from speedrun.config import ModelConfig
from speedrun.kernels import choose, use_triton
from speedrun.model import GPT


def test_auto_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INSTALLED", True)
    assert choose("auto", "cpu", "bf16")[0] == "torch" and "cpu" in choose("auto", "cpu", "bf16")[1]
    assert choose("auto", "cuda", "fp32") == ("torch", "the run computes in fp32 and the kernels pay in bf16")
    assert choose("auto", "cuda", "bf16")[0] == "triton" and choose("triton", "cuda", "fp32")[0] == "triton"
    assert choose("torch", "cuda", "bf16") == ("torch", "as asked")
    monkeypatch.setattr(kernels, "INSTALLED", False)
    assert choose("auto", "cuda", "bf16") == ("torch", "Triton is not installed")


def test_triton_where_it_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="model.kernels is triton, but the run computes on cpu"):
        choose("triton", "cpu", "bf16")
    with pytest.raises(ValueError, match="model.kernels is triton, but"):
        use_triton("triton", torch.zeros(1))
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    with pytest.raises(ValueError, match="float64"):
        use_triton("triton", torch.zeros(1, dtype=torch.float64))
    monkeypatch.setattr(kernels, "INSTALLED", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        choose("triton", "cuda", "bf16")
    assert not use_triton("auto", torch.zeros(1)) and not use_triton("torch", torch.zeros(1))


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
