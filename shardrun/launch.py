"""Starting `accelerate launch` from a verb: the shipped config files, the command as a learner types it, the run."""

import contextlib
import importlib.resources
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from strategies.errors import UserError


def shipped_config(name: str) -> Path:
    """The path of a shipped accelerate config, for example 'cpu/zero2'. Raises ValueError for a name there is not."""
    path = _folder() / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"there is no accelerate config {name!r}; there are {', '.join(shipped_names())}.")
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
    seconds. An interrupt, or the end of that time (subprocess.TimeoutExpired), ends everything that was started.
    """
    with running(launching(config, ["-m", module, *arguments], options), output) as process:
        return process.wait(timeout)


def launching(config: Path, what: list[str], options: list[str] | None = None) -> list[str]:
    """The command that launches `-m MODULE …` or a script, with the Python that we are in."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *(options or [])]
    return [*launcher, "--config_file", str(config), *what]


@contextlib.contextmanager
def running(
    command: list[str], output: Path | None = None, errors: Path | None = None, added: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process, in a session of its own and without input, and all that it starts; what is left at the end is ended.

    output, errors: files for what it prints (errors: by default with the output), or None to let it through.
    added: variables for its environment.
    """
    with contextlib.ExitStack() as files:
        out = files.enter_context(open(output, "wb")) if output else None
        err = files.enter_context(open(errors, "wb")) if errors else out and subprocess.STDOUT
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **(added or {})}
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                _end(process)


GRACE = 20
"""Seconds that a launcher and its ranks get to end by themselves after an interruption."""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the launcher, which passes it on to its ranks, and kill whatever is left after GRACE seconds.

    torchrun gives its ranks sessions of their own: killing the launcher's process group would leave them behind.
    """
    import psutil

    ranks = psutil.Process(process.pid).children(recursive=True)
    try:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:  # also when the wait itself is interrupted: a second Ctrl-C
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        process.kill()
        process.wait()


def what_went_wrong(log: Path) -> str:
    """A failed run's own sentence out of its output, or the end of the output where it left none."""
    lines = log.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if "shardrun: error: " in line:
            return line.partition("shardrun: error: ")[2].rstrip(".")
    return "\n".join(lines[-30:])
