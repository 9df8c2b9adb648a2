"""The trainer's GPU path without a GPU: whole runs, from the preset to the checkpoint, on fake CUDA tensors.

What is fake and what is not stands in tests/fake_cuda/__init__.py; what is asserted at every call of attention and of a
kernel, with its sources, in tests/fake_cuda/functions.py. Models and rows are small (tests/rehearsal/rehearse.py), all
that a preset switches on is on. Several ranks are rank 0 of 8, and leave the checkpoint of 8 ranks unfinished: the
others' shards are not there. DeepSpeed is not rehearsed. No number that a GPU would compute is looked at.

A cover: every preset, every strategy in both precisions, every attention function in bf16, and compiled blocks.
`speedrun`, which has all that the other presets have, runs under every strategy.
"""

from pathlib import Path

import pytest

from speedrun.presets import PRESETS
from strategies.base import Precision
from tests.fake_cuda.process import FakeCUDAProcess
from tests.model.attention_on_cpu import VARLEN
from tests.rehearsal.rehearse import rehearse, waits

LOSS = {"cross_entropy", "cross_entropy_and_gradients"}
"""Our operators of every run in bf16. (Which of the others run goes by what has been measured.)"""
ATTENTION = {
    "sdpa": "scaled_dot_product_attention",
    "flex": "flex_attention",
    "varlen": "_varlen_attn",
    "flash": "flash_attn_varlen_func",
}

RUNS = [
    ("tiny", "single", "fp32", "auto", False),
    ("tiny", "fsdp", "fp32", "auto", False),
    ("gpt2", "fsdp", "bf16", "auto", False),
    ("modern", "ddp", "bf16", "auto", False),
    ("speedrun", "fsdp", "bf16", "auto", False),
    ("speedrun", "ddp", "fp32", "auto", False),
    ("speedrun", "single", "bf16", "varlen", False),
    ("speedrun", "single", "bf16", "flash", False),
    ("speedrun", "single", "bf16", "flex", True),
    ("speedrun_24gb", "ddp", "bf16", "sdpa", False),
]


@pytest.mark.parametrize(("preset", "strategy", "precision", "attention", "compiled"), RUNS)
def test_a_run_on_a_gpu(
    preset: str,
    strategy: str,
    precision: Precision,
    attention: str,
    compiled: bool,
    tmp_path: Path,
    gpus: FakeCUDAProcess,
) -> None:
    if attention == "varlen" and not VARLEN:
        pytest.skip("torch's variable-length attention has windows from 2.11 on")
    calls = gpus.run(rehearse, preset, strategy, precision, str(tmp_path), {"attention": attention}, compiled)
    attended = {name for name, function in ATTENTION.items() if function in calls}
    assert attended == {attention} if attention != "auto" else attended
    assert LOSS & set(calls) == (LOSS if precision == "bf16" else set())


@pytest.mark.parametrize("strategy", ("single", "ddp", "fsdp"))
def test_nothing_waits_for_the_device_in_a_steady_step(strategy: str, tmp_path: Path, gpus: FakeCUDAProcess) -> None:
    """Norm, clipping, spikes and steps that are left out are decided there, and read a step later."""
    assert gpus.run(waits, "speedrun", strategy, str(tmp_path)) == {}


def test_the_runs_are_a_cover() -> None:
    assert {run[0] for run in RUNS} == set(PRESETS)
    assert {run[1:3] for run in RUNS} == {(s, p) for s in ("single", "ddp", "fsdp") for p in ("fp32", "bf16")}
    assert {run[3] for run in RUNS if run[2] == "bf16"} == {"auto", *ATTENTION}
