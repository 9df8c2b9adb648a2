"""Python itself: its version, which of several is meant, the scripts on the PATH, the virtual environment, packages."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from shardrun.doctor import shell
from shardrun.doctor.report import Finding

OLDEST, NEWEST = (3, 11), (3, 13)
"""As in pyproject.toml."""

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, or the folder of installed packages."""


def version(found: tuple[int, ...] = sys.version_info[:3], is_64_bit: bool = sys.maxsize > 2**32) -> Iterator[Finding]:
    """Whether Shardrun and torch exist for this Python."""
    shown = ".".join(map(str, found))
    oldest, newest = (".".join(map(str, pair)) for pair in (OLDEST, NEWEST))
    if not OLDEST <= found[:2] <= NEWEST:
        said = f"{shown} ({sys.executable}); Shardrun needs {oldest} to {newest}"
        yield Finding("Python", "failure", said, _new_environment(newest, shell.current()))
    elif not is_64_bit:
        said = f"{shown} is a 32-bit build ({sys.executable}), for which there is no torch; install a 64-bit one"
        yield Finding("Python", "failure", said, _new_environment(newest, shell.current()))
    else:
        yield Finding("Python", "ok", f"{shown}, {sys.executable}")


def _new_environment(version: str, name: str) -> str:
    if name in ("powershell", "cmd"):
        return f"py -{version} -m venv .venv\n" + shell.activate(".venv", name)
    if (ROOT / "Makefile").is_file():
        return f"make PYTHON=python{version} setup"
    return f"python{version} -m venv .venv\n" + shell.activate(".venv", name)


def which_python() -> Iterator[Finding]:
    """Whether `python` in this shell is the Python that is running: with several, pip and python are easily two."""
    ours = os.path.dirname(sys.executable)
    pythons: list[str] = []
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        found = shutil.which("python", path=folder) or shutil.which("python3", path=folder)
        if found and not any(_same_folder(found, other) for other in pythons):
            pythons.append(found)
    name = shell.current()
    first = shutil.which("python") or shutil.which("python3")
    if first is None or not _same_folder(first, sys.executable):
        meant = f"`python` here is {first}, another one than" if first else "no `python` is on the PATH; this is"
        if first and "WindowsApps" in first:
            meant = (
                f"`python` here is {first}, the Microsoft Store's stand-in (Settings, Apps, App execution aliases: "
                "switch python.exe off); this is"
            )
        fix = shell.activate(sys.prefix, name) if _in_venv() else shell.add_to_path(ours, name)
        yield Finding("which Python", "warning", f"{meant} {sys.executable}", fix)
    else:
        several = f", the first of {len(pythons)} on the PATH" if len(pythons) > 1 else ""
        yield Finding("which Python", "ok", f"`python` is this one{several}")


def _same_folder(one: str, other: str) -> bool:
    """By folder and not by file: the Python of a virtual environment is often a link to the system's."""
    return os.path.realpath(os.path.dirname(one)) == os.path.realpath(os.path.dirname(other))


def scripts() -> Iterator[Finding]:
    """Whether the scripts `shardrun` and `accelerate` are found, and are those of this Python."""
    name = shell.current()
    python = shell.command([sys.executable], name)
    for script, module in (("shardrun", "shardrun"), ("accelerate", "accelerate.commands.accelerate_cli")):
        installed = next(filter(None, (shutil.which(script, path=folder) for folder in _script_folders())), None)
        found = shutil.which(script)
        works = f"`{python} -m {module}` works"
        if installed is None:
            target = ["--editable", str(ROOT)] if (ROOT / "pyproject.toml").is_file() else [script]
            said = f"no script is installed for this Python; from this folder {works}"
            yield Finding(
                script, "warning", said, shell.command([sys.executable, "-m", "pip", "install", *target], name)
            )
        elif found is None or not _same_folder(found, installed):
            where = "which is not on the PATH" if found is None else f"but the PATH leads to {found}, of another Python"
            fix = (
                shell.activate(sys.prefix, name) if _in_venv() else shell.add_to_path(os.path.dirname(installed), name)
            )
            yield Finding(script, "warning", f"the script is {installed}, {where}; {works}", fix)
        else:
            yield Finding(script, "ok", found)


def _script_folders() -> list[str]:
    """Where pip puts scripts for this Python: its own folder, and the user's (`pip install --user`)."""
    user = sysconfig.get_preferred_scheme("user")
    return [sysconfig.get_path("scripts"), sysconfig.get_path("scripts", user)]


def _in_venv() -> bool:
    return sys.prefix != sys.base_prefix


def virtual_environment() -> Iterator[Finding]:
    """Whether packages are installed for this project alone."""
    name = "environment"
    active = os.environ.get("VIRTUAL_ENV")
    if _in_venv() and active and os.path.realpath(active) != os.path.realpath(sys.prefix):
        said = f"{active} is active, but this Python is that of {sys.prefix}: pip and python work on different ones"
        yield Finding(name, "warning", said, shell.activate(sys.prefix, shell.current()))
    elif _in_venv():
        yield Finding(name, "ok", f"virtual environment {sys.prefix}")
    elif (Path(sys.prefix) / "conda-meta").is_dir():
        yield Finding(name, "ok", f"conda environment {sys.prefix}")
    else:
        said = f"none: packages go into {sys.prefix}, which other programs use too"
        yield Finding(
            name, "warning", said, _new_environment(".".join(map(str, sys.version_info[:2])), shell.current())
        )


def packages() -> Iterator[Finding]:
    """Whether everything that Shardrun needs is installed, in a version that it works with."""
    from importlib import metadata

    from packaging.requirements import Requirement

    found, sound = [], True
    for text in requirements():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        fix = shell.command([sys.executable, "-m", "pip", "install", wanted], shell.current())
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "failure", "is not installed", fix)
            sound = False
            continue
        found.append(f"{requirement.name} {installed}")
        if not requirement.specifier.contains(installed, prereleases=True):
            said = f"{installed} is installed; Shardrun works with {requirement.specifier}"
            yield Finding(requirement.name, "failure", said, fix)
            sound = False
    if sound:
        yield Finding("packages", "ok", ", ".join(found))


def requirements() -> list[str]:
    """What the installed package asks for, or the checkout where it is not installed."""
    from importlib import metadata

    if (ROOT / "pyproject.toml").is_file():
        import tomllib

        with open(ROOT / "pyproject.toml", "rb") as file:
            return list(tomllib.load(file)["project"]["dependencies"])
    return metadata.requires("shardrun") or []
