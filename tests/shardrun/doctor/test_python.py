"""Which Python, which scripts, which shell: each of the ways in which they go wrong, made to happen."""

import ast
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from shardrun.doctor import python, shell
from shardrun.doctor.report import Finding

ROOT = Path(__file__).parents[3]


def program(path: Path) -> Path:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def by_name(lines: list[Finding]) -> dict[str, Finding]:
    return {line.name: line for line in lines}


def test_python_versions_are_those_of_pyproject() -> None:
    asked = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    for minor in range(8, 17):
        (line,) = python.version((3, minor, 1))
        assert (line.status == "ok") == (f"3.{minor}" in asked), line
        assert (line.fix == "") == (line.status == "ok")
    (line,) = python.version(is_64_bit=False)
    assert line.status == "failure" and "32-bit" in line.said


def test_a_python_that_is_too_old_can_read_what_tells_it_so() -> None:
    for name in ("__init__", "__main__", "doctor/__init__", "doctor/report", "doctor/shell", "doctor/python"):
        source = (ROOT / "shardrun" / f"{name}.py").read_text(encoding="utf-8")
        ast.parse(source, feature_version=(3, 8))
        assert "from __future__ import annotations" in source or name == "__init__"


def test_another_python_comes_first_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = program(tmp_path / "other" / "python")
    ours = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", os.pathsep.join((str(other.parent), ours)))
    (line,) = python.which_python()
    assert line.status == "warning" and str(other) in line.said and sys.executable in line.said and line.fix
    monkeypatch.setenv("PATH", os.pathsep.join((ours, str(other.parent))))
    (line,) = python.which_python()
    assert line.status == "ok" and "the first of 2" in line.said
    monkeypatch.setenv("PATH", str(tmp_path))
    (line,) = python.which_python()
    assert line.status == "warning" and "no `python` is on the PATH" in line.said
    store = program(tmp_path / "Microsoft" / "WindowsApps" / "python")
    monkeypatch.setenv("PATH", str(store.parent))
    (line,) = python.which_python()
    assert line.status == "warning" and "App execution aliases" in line.said


@pytest.mark.parametrize("in_venv", (False, True))
def test_a_script_that_is_installed_but_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_venv: bool
) -> None:
    folder = tmp_path / "scripts of this Python"
    for name in ("shardrun", "accelerate"):
        program(folder / name)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(folder))
    monkeypatch.setattr(python, "_in_venv", lambda: in_venv)
    monkeypatch.setattr(shell, "current", lambda: "bash")
    monkeypatch.setenv("PATH", os.defpath)
    lines = by_name(list(python.scripts()))
    for name in ("shardrun", "accelerate"):
        assert lines[name].status == "warning" and "not on the PATH" in lines[name].said
        assert f"{sys.executable} -m {name}" in lines[name].said  # works, and is said to
    fix = lines["shardrun"].fix
    if in_venv:
        assert fix == f"source {sys.prefix}/bin/activate"
        return
    # A bash that does as it is told finds it, and so does every one after it.
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "PATH": os.defpath}
    now = subprocess.run(["bash", "-c", f"{fix}\ncommand -v shardrun"], env=environment, capture_output=True, text=True)
    later = subprocess.run(
        ["bash", "-c", "source ~/.bashrc; command -v shardrun"], env=environment, capture_output=True, text=True
    )
    assert now.stdout.strip() == later.stdout.strip() == str(folder / "shardrun"), now.stderr + later.stderr


def test_the_script_of_another_python_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("ours", "others"):
        program(tmp_path / folder / "shardrun")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path / "ours"))
    monkeypatch.setenv("PATH", str(tmp_path / "others"))
    lines = by_name(list(python.scripts()))
    assert lines["shardrun"].status == "warning" and f"leads to {tmp_path / 'others'}" in lines["shardrun"].said
    assert lines["accelerate"].status == "warning" and "no script is installed" in lines["accelerate"].said
    monkeypatch.setenv("PATH", str(tmp_path / "ours"))
    assert by_name(list(python.scripts()))["shardrun"].status == "ok"


def test_virtual_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/elsewhere")
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert [line.status for line in python.virtual_environment()] == ["ok"]
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    (line,) = python.virtual_environment()
    assert line.status == "warning" and str(tmp_path) in line.said and "activate" in line.fix
    monkeypatch.delenv("VIRTUAL_ENV")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    (line,) = python.virtual_environment()
    assert line.status == "warning" and line.said.startswith("none") and line.fix
    (tmp_path / "conda-meta").mkdir()
    assert [line.status for line in python.virtual_environment()] == ["ok"]


def test_packages_that_are_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line.status for line in python.packages()] == ["ok"]
    asked = ["numpy>=1", "torch<2", "a-package-that-is-not-there>=3", 'nothing; sys_platform == "nowhere"']
    monkeypatch.setattr(python, "requirements", lambda: asked)
    monkeypatch.setattr(shell, "current", lambda: "bash")
    lines = by_name(list(python.packages()))
    assert {name: line.status for name, line in lines.items()} == {
        "torch": "failure",
        "a-package-that-is-not-there": "failure",
    }
    assert lines["torch"].fix.endswith("-m pip install 'torch<2'")  # unquoted it would read from a file


@pytest.mark.skipif(sys.platform != "linux", reason="names a process by its file, as Linux does")
@pytest.mark.parametrize("name", ("bash", "zsh", "fish", "pwsh"))
def test_the_shell_at_hand_is_the_nearest_parent_that_is_one(tmp_path: Path, name: str) -> None:
    there = tmp_path / name
    there.symlink_to("/bin/bash")
    asked = f"{sys.executable} -c 'from shardrun.doctor import shell; print(shell.current())'; true"
    # Through `sh`, as from a Makefile: that is not what the user types into.
    done = subprocess.run([there, "-c", f'sh -c "{asked}"; true'], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == {"pwsh": "powershell"}.get(name, name)


def test_fixes_in_the_syntax_of_each_shell() -> None:
    folder = "C:\\Users\\Ann O'Hara\\Scripts"
    assert shell.add_to_path("/a b", "fish") == "fish_add_path '/a b'"
    assert shell.add_to_path("/a", "zsh").endswith(">> ~/.zshrc")
    assert shell.add_to_path(folder, "powershell").splitlines()[0] == (
        "$env:Path = 'C:\\Users\\Ann O''Hara\\Scripts;' + $env:Path"
    )
    assert shell.add_to_path(folder, "cmd").splitlines()[0] == f'set "PATH={folder};%PATH%"'
    for name in ("powershell", "cmd"):
        assert "'User')" in shell.add_to_path(folder, name).splitlines()[1]
    assert shell.activate("/v", "bash") == shell.activate("/v", "zsh") == "source /v/bin/activate"
    assert shell.activate("/v", "fish") == "source /v/bin/activate.fish"
    assert shell.activate("C:\\my v", "powershell") == "& 'C:\\my v\\Scripts\\Activate.ps1'"
    assert shell.activate("C:\\my v", "cmd") == '"C:\\my v\\Scripts\\activate.bat"'
    assert [shell.unset(["A", "B"], name) for name in ("bash", "fish", "powershell", "cmd")] == [
        "unset A B", "set -e A B", "Remove-Item Env:A, Env:B", 'set "A=" & set "B="',
    ]  # fmt: skip
