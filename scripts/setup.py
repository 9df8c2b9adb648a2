"""Make the environment in .venv: torch for this machine, then Shardrun with its extras, both by pip.

`make` runs it before every target. It needs nothing but a Python and its standard library, and is safe to repeat:
a stamp in .venv records what the environment was made from, and while that holds there is nothing to do.
pip's own settings (PIP_* variables, pip.conf) apply.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "shardrun-setup.json"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

OLDEST, NEWEST = (3, 11), (3, 13)
TORCH = ">=2.9,<2.14"  # as in pyproject.toml
CPU_TORCH = "==2.13.0+cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = "data,dev,kernels,logging,plots"
NETWORK_ERRORS = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "ProxyError", "SSLError", "timed out")


def main() -> None:
    """Bring .venv up to date. Exits with one sentence, and pip's last lines, where it cannot."""
    cuda = has_cuda()
    recipe = current_recipe(cuda)
    made = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    if made == recipe and PYTHON.exists() and not other_python_asked_for():
        return
    start = time.perf_counter()
    moved = made.get("checkout", recipe["checkout"]) != recipe["checkout"]
    make_venv(clear=moved or other_python_asked_for())
    STAMP.unlink(missing_ok=True)
    torch = suitable_torch(cuda) or install_torch(cuda)
    extras = EXTRAS + (",gpu" if cuda else "")
    install(f"Shardrun with its extras ({extras})", "--editable", f"{ROOT}[{extras}]", required=True)
    if cuda:
        warn_without_gpu(torch)
    STAMP.write_text(json.dumps(recipe))
    say(f".venv is ready: torch {torch}, {time.perf_counter() - start:.0f} s")


def say(line: str) -> None:
    """Report a step."""
    print(f"setup: {line}", flush=True)


def has_cuda() -> bool:
    """Whether an NVIDIA driver answers and has a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU" in listing.stdout


def current_recipe(cuda: bool) -> dict[str, object]:
    """What the environment depends on. The checkout's path is part of it: scripts in .venv name it."""
    sources = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return {"sources": hashlib.sha256(sources).hexdigest(), "checkout": str(ROOT), "cuda": cuda}


def other_python_asked_for() -> bool:
    """Whether `make PYTHON=...` was given and is not what .venv was made from."""
    config = VENV / "pyvenv.cfg"
    if "PYTHON" not in os.environ or not config.exists():
        return False
    settings = dict(line.split(" = ", 1) for line in config.read_text().splitlines() if " = " in line)
    return settings.get("version", "").split(".")[:2] != [str(number) for number in sys.version_info[:2]]


def make_venv(clear: bool) -> None:
    """Create .venv with pip in it, unless a working one is there. `clear` empties it first."""
    if clear and VENV.is_symlink():  # venv --clear would empty the folder that it leads to, which is another checkout's
        raise SystemExit(
            f"setup: .venv is a link to {VENV.resolve()}, which was made for another checkout or Python: "
            "remove the link (`rm .venv`) and try again."
        )
    if not clear and PYTHON.exists() and runs(PYTHON, "-m", "pip", "--version"):
        return
    oldest, newest, version = (".".join(map(str, pair)) for pair in (OLDEST, NEWEST, sys.version_info[:2]))
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise SystemExit(
            f"setup: {sys.executable} is Python {version} and Shardrun needs {oldest} to {newest}: "
            "name one that is, for example `make PYTHON=python3.12 test`."
        )
    if not runs(Path(sys.executable), "-c", "import venv, ensurepip"):
        raise SystemExit(
            f"setup: {sys.executable} comes without the venv module: install it (on Debian and Ubuntu "
            f"`apt install python{version}-venv`), or name another Python, for example `make PYTHON=python3.12 test`."
        )
    say(f"creating .venv with Python {version}")
    command = [sys.executable, "-m", "venv"]
    if clear:
        command.append("--clear")
    if subprocess.run([*command, str(VENV)]).returncode != 0:
        raise SystemExit("setup: .venv could not be created (Python's message is above): remove it and try again.")


def runs(python: Path, *arguments: str) -> bool:
    """Whether the command succeeds; its output is dropped."""
    return subprocess.run([str(python), *arguments], capture_output=True).returncode == 0


def suitable_torch(cuda: bool) -> str:
    """The version of the torch in .venv if it is in range and, with `cuda`, built for CUDA; else ''."""
    code = (
        "from importlib.metadata import version; from pip._vendor.packaging.specifiers import SpecifierSet; "
        f"torch = version('torch'); assert torch in SpecifierSet('{TORCH}'); "
    )
    if cuda:
        code += "import torch as module; assert module.version.cuda; "
    found = subprocess.run([str(PYTHON), "-c", code + "print(torch)"], capture_output=True, text=True, cwd=VENV)
    return found.stdout.strip() if found.returncode == 0 else ""


def install_torch(cuda: bool) -> str:
    """Install the CUDA build where there is a GPU, else the CPU build where it can be had. Returns its version."""
    # Elsewhere than on Linux the default build is the CPU build (or Apple's).
    if not cuda and sys.platform == "linux":
        if not install("the CPU build of torch", f"torch{CPU_TORCH}") and not install(
            "the CPU build of torch, from PyTorch's index", f"torch{TORCH}", "--index-url", CPU_INDEX
        ):
            say("the CPU build of torch could not be had: taking the default build, which is larger and works as well")
            install("torch", f"torch{TORCH}", required=True)
    else:
        if cuda:  # A CPU build that is in the way would satisfy pip.
            runs(PYTHON, "-m", "pip", "uninstall", "--yes", "torch")
        install("torch", f"torch{TORCH}", required=True)
    return suitable_torch(cuda) or "(a CPU build)"


def install(what: str, *arguments: str, required: bool = False) -> bool:
    """Run `pip install` with these arguments and tell whether it worked.

    Its large downloads and builds are shown as they come. Exits with its last lines if it fails and is `required`.
    """
    say(f"installing {what}")
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if "Downloading" in line and " MB)" in line or "Building wheel" in line and "started" in line:
                print(f"  {line.strip()}", flush=True)
    if process.returncode != 0 and required:
        print("\n".join(lines[-12:]), file=sys.stderr)
        if any(error in line for line in lines for error in NETWORK_ERRORS):
            raise SystemExit(
                f"setup: pip could not reach a package index for {what} (its last lines are above): connect to the "
                "network or set PIP_INDEX_URL to an index you can reach, and run the same command again."
            )
        raise SystemExit(
            f"setup: pip could not install {what} (its last lines are above); run the same command again when that is "
            "put right: what is installed already is kept."
        )
    return process.returncode == 0


def warn_without_gpu(torch: str) -> None:
    """Say so where the driver has GPUs and torch cannot use them."""
    if not runs(PYTHON, "-c", "import torch; assert torch.cuda.is_available()"):
        say(
            f"torch {torch} sees no GPU although nvidia-smi does: its CUDA is newer than the driver, or pip's index "
            "has only a CPU build; install one that fits with .venv/bin/pip, it will be kept"
        )


if __name__ == "__main__":
    main()
