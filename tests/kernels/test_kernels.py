"""Runs tests/kernels/checks in a process of their own: in Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CHECKS = Path(__file__).parent / "checks"
INTERPRETER = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_checks(folder: Path, environment: dict[str, str]) -> None:
    files = sorted(str(path) for path in folder.glob("[a-z]*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-500:]


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_checks(CHECKS, INTERPRETER)


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    run_checks(CHECKS, {"TRITON_INTERPRET": "0"})


@pytest.mark.ranks
def test_under_strategies_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_checks(CHECKS / "ranks", INTERPRETER)
