"""`shardrun doctor` as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardrun import doctor
from shardrun.doctor import machine
from shardrun.doctor.report import Finding, Report, layout
from tests.shardrun.doctor.test_tokens import GOOD_HF, GOOD_WANDB

ROOT = Path(__file__).parents[3]


def run_doctor(*arguments: str, python: str = sys.executable, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "shardrun", "doctor", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_everything_broken_at_once_is_named_with_its_fix_and_without_the_tokens(tmp_path: Path) -> None:
    """Another torch, an old driver, no scripts on the PATH, wrong tokens, a default config, a leftover variable."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not this one')\n")
    (tmp_path / "torch" / "version.py").write_text(
        "from typing import Optional\n__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n"
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho '0, 535.54.03, 24564, 20000, NVIDIA L4'\n")
    (programs / "nvidia-smi").chmod(0o755)
    config = tmp_path / ".cache" / "huggingface" / "accelerate" / "default_config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    secret_in_file = "0f" * 19 + "!!"
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {secret_in_file}\n")
    (tmp_path / ".netrc").chmod(0o600)
    environment = {
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))),
        "PATH": os.pathsep.join((str(programs), os.defpath)),
        "HF_TOKEN": f"'{GOOD_HF}'",
        "ACCELERATE_USE_CPU": "true",
    }
    for variable in ("HF_HOME", "XDG_CACHE_HOME", "HF_TOKEN_PATH", "NETRC", "WANDB_API_KEY"):
        environment[variable] = ""
    environment = {name: value for name, value in environment.items() if value}
    inherited = {name: value for name, value in os.environ.items() if name in ("LANG", "LC_ALL", "SYSTEMROOT")}
    command = [sys.executable, "-m", "shardrun", "doctor", "--quick"]
    options = {"cwd": ROOT, "env": {**inherited, **environment}, "capture_output": True, "text": True, "timeout": 60}
    shown = subprocess.run([*command, "--json"], **options)
    assert shown.returncode == 1 and shown.stderr == "", shown.stderr
    content = json.loads(shown.stdout)
    lines = {line["name"]: line for line in content["lines"]}
    assert content["schema"] == 1 and content["failure"] == 3
    for name in ("torch", "variables", "Hugging Face token"):
        assert lines[name]["status"] == "failure" and lines[name]["fix"], lines[name]
    for name in ("accelerate", "which Python", "default config", "W&B key", "GPU memory"):
        assert lines[name]["status"] == "warning" and lines[name]["fix"], lines[name]
    assert "needs driver 580" in lines["torch"]["said"] and "ddp on 3 ranks" in lines["default config"]["said"]

    text = subprocess.run(command, **options)
    assert text.returncode == 1 and "3 failures." in text.stdout
    for secret in (GOOD_HF, secret_in_file):
        assert secret not in shown.stdout + text.stdout + text.stderr
    for row in text.stdout.splitlines():
        assert len(row) <= 100 or row.lstrip().startswith(("fix: ", "[Env", "echo ")) or "/" in row, row


def test_the_doctor_itself_loads_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, contextlib\nfrom shardrun.__main__ import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['doctor', '--quick', '--json'])\n"
        "print(*sorted({'torch', 'accelerate', 'deepspeed', 'wandb', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.split() == [] and json.loads(done.stdout)["lines"]


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(f"the world has ended, and {GOOD_WANDB} with it")

    monkeypatch.setenv("WANDB_API_KEY", GOOD_WANDB)
    monkeypatch.setattr(machine, "memory", broken)
    report = Report()
    doctor.examine(report, quick=True, timeout=1)
    (line,) = [line for _, line in report.lines if "the world has ended" in line.said]
    assert line.status == "failure" and report.lines[-1][0] == "Settings"
    assert "the world has ended, and *** with it" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_python_ends_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.python, "version", lambda: [Finding("Python", "failure", "3.9.1")])
    report = Report(silent=True)
    doctor.examine(report, quick=True, timeout=1)
    assert [line.name for _, line in report.lines] == ["Python"]


def test_lines_fit_a_hundred_columns_and_commands_are_not_broken() -> None:
    line = Finding("a name", "warning", "word " * 60, "x" * 150 + "\nsecond")
    rows = layout(line)
    assert all(len(row) <= 100 for row in rows[:-2])
    assert rows[-2].endswith("x" * 150) and rows[-1].endswith("     second")


def test_a_time_limit_that_is_none_is_refused() -> None:
    done = run_doctor("--timeout", "0")
    assert done.returncode == 2 and "--timeout 0 is no time" in done.stderr


@pytest.mark.ranks
@pytest.mark.slow
def test_the_whole_examination_of_this_machine(warm_python: str) -> None:
    """Every strategy trains five steps; nothing that this suite runs on is a failure."""
    done = run_doctor("--json", python=warm_python, timeout=280)
    content = json.loads(done.stdout)
    lines = {line["name"]: line for line in content["lines"]}
    assert [line for line in content["lines"] if line["status"] == "failure"] == [] and done.returncode == 0
    trained = ("single", "ddp", "fsdp", *(("zero1", "zero2", "zero3") if sys.platform == "linux" else ()))
    for name in ("two ranks, gloo", *trained):
        assert lines[name]["status"] == "ok", lines[name]
