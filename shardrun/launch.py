"""Starting `accelerate launch` from a verb: the shipped config files, the command as a learner would type it, the
run.
"""

import contextlib
import importlib.resources
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path


def shipped_config(name: str) -> Path:
    """The path of a shipped accelerate config, for example 'cpu/zero2'. Raises ValueError for a name there is not."""
    path = _folder() / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no accelerate config {name!r}; there are {', '.join(shipped_names())}.")
    return path


def shipped_names() -> list[str]:
    """The names of all shipped configs."""
    return sorted(path.relative_to(_folder()).with_suffix("").as_posix() for path in _folder().rglob("*.yaml"))


def _folder() -> Path:
    return Path(str(importlib.resources.files("accelerate_configs")))


def find_config(name: str) -> Path:
    """A config by path, or by the name of a shipped one. Raises ValueError where it is neither."""
    return Path(name) if Path(name).is_file() else shipped_config(name.removesuffix(".yaml"))


def shown(config: Path, module: str, arguments: list[str], options: list[str] | None = None) -> str:
    """The command as it can be typed from here: the config's path relative to this folder where that is shorter."""
    relative = os.path.relpath(config)
    path = relative if len(relative) < len(str(config)) else str(config)
    return shlex.join(["accelerate", "launch", *(options or []), "--config_file", path, "-m", module, *arguments])


def launch(
    config: Path,
    module: str,
    arguments: list[str],
    options: list[str] | None = None,
    output: Path | None = None,
    timeout: float | None = None,
) -> int:
    """Run a module under accelerate launch and wait; returns its exit status.

    options: of accelerate launch itself; output: a file for everything it prints, or None to let it through; timeout:
    seconds. When this process is interrupted or the time is up (subprocess.TimeoutExpired), so is everything that was
    started.
    """
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *(options or [])]
    command += ["--config_file", str(config), "-m", module, *arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with open(output or os.devnull, "w", encoding="utf-8") as file:
        streams = {"stdout": file, "stderr": subprocess.STDOUT} if output else {}
        process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)  # type: ignore[call-overload]
        try:
            return process.wait(timeout)
        except BaseException:
            _end(process)
            raise


GRACE = 20
"""Seconds that a launcher and its ranks get to end by themselves after an interruption."""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the launcher, which passes it on to its ranks, and kill whatever is left after GRACE seconds.

    torchrun gives its ranks sessions of their own: killing the launcher's process group would leave them behind.
    """
    import psutil

    ranks = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    process.kill()


def what_went_wrong(log: Path) -> str:
    """A failed run's own sentence out of its output, or the end of the output where it left none."""
    lines = log.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if "shardrun: error: " in line:
            return line.partition("shardrun: error: ")[2].rstrip(".")
    return "\n".join(lines[-30:])
