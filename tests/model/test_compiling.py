"""torch.compile: the same losses to rounding, or a sentence why not."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from speedrun.config import ModelConfig
from speedrun.model import GPT
from speedrun.model.compiling import compile_blocks, without_spaces
from speedrun.run.checks import check
from tests.speedrun.runs import launch_of, small

MODEL = ModelConfig(
    layers=2,
    heads=2,
    width=32,
    mlp_width=48,
    window_short=5,
    window_long=9,
    long_layers=(1,),
    attention_gate=True,
    partial_key_offset=True,
)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_model_has_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a space in the paths of temporary files, which torch's C++ compilation on a CPU cannot handle by itself."""
    (tmp_path / "a b").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "a b"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    without_spaces()
    tokens = torch.randint(1, 257, (2, 17), generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        model = GPT(dataclasses.replace(MODEL, zero_init_projections=False), document_start=0)
        model.init_weights(1)
        if compiled:
            compile_blocks(model, cpu=True)
        for windows in ([(5, 9)], [(5, 9), (7, 12)]):
            model.set_windows(windows)
            loss = model(tokens[:, :-1], tokens[:, 1:])
            results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in GPT(MODEL).named_parameters()}, "compiling renames nothing"
    for plain, compiled_ in zip(results[:2], results[2:], strict=True):
        for a, b in zip(plain, compiled_, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not torch.equal(results[0][0], results[1][0]), "windows matter"


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compile = True does not go with ZeRO-3"):
        check(small(model=MODEL, compile=True), launch_of("zero3"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="compile = True needs a C.. compiler on a CPU, and there is no g.."):
        compile_blocks(GPT(MODEL), cpu=True)
