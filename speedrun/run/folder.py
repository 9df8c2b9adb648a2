"""What a run leaves: `runs/<name>/` with its configuration, environment, a line per step, its books and its end.

    config.json       everything resolved: the run's own fields, the launch, the accelerate config file as written
    environment.json  versions, machine, command line, commit
    metrics.jsonl     one line per step, flushed at once, so that a killed run is readable up to its last step; one
                      that was left out says "skipped", and in fp16 each says its loss_scale as the step has left it
    ledger.json       what every rank holds and sends, in bytes: predicted for the device, kernels, attention functions,
                    precision and torch's version under "predicted for", measured, and the remainder; on a GPU the
                    allocator's figures beside (speedrun/books/measured.py)
    summary.json      how it ended: 'running', 'finished', 'interrupted' (Ctrl-C), 'preempted' (SIGTERM) or
                      'failed', and the last figures
    record.txt, curves.png   of a run with a target: the record in the form of the public ones (speedrun/run/record.py)

Every file carries `schema`. Only rank 0 writes.
"""

import dataclasses
import json
import netrc
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from speedrun.config import Config
from speedrun.run.record import write_record
from strategies import strict_json
from strategies.ledger import book
from strategies.select import Launch

SCHEMA = 1

WANDB_FINISH = 60
"""Seconds to wait at the end for Weights & Biases to upload the rest."""

WANDB_TIMEOUT = 20
"""Seconds to wait for Weights & Biases before the run goes on offline."""


class RunFolder:
    """The open folder of a run.

    resumed_at: None for a new run, which raises FileExistsError where one of that name exists already; a step for one
    that goes on from there: its lines up to that step stay.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        preset: str,
        data_hash: str,
        parameters: int,
        resumed_at: int | None = None,
    ):
        name = config.name or f"{preset}-{launch.strategy}-{launch.world_size}x-{time.strftime('%Y%m%d-%H%M%S')}"
        self.path = Path(config.out) / name
        lines = self.path / "metrics.jsonl"
        if lines.exists() and resumed_at is None:
            raise FileExistsError(
                f"{self.path} holds a run already; give this one another --name, or remove the folder."
            )
        kept = _lines_up_to(lines, resumed_at) if lines.exists() and resumed_at is not None else []
        self.path.mkdir(parents=True, exist_ok=True)
        self.target = config.target_val_loss
        self._write(
            "config.json",
            {
                "preset": preset,
                "run": dataclasses.asdict(config),
                "launch": dataclasses.asdict(launch),
                "data_hash": data_hash,
                "parameters": parameters,
                "resumed_at": resumed_at,
            },
        )
        self._write("environment.json", environment())
        if kept:  # in one move: a run killed just now keeps the lines that it had
            partial = self.path / ".metrics.jsonl.partial"
            partial.write_text("".join(strict_json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(partial, lines)
        self._metrics = open(lines, "a" if kept else "w", encoding="utf-8")  # noqa: SIM115
        self._unwritten = False
        self._wandb = _start_wandb(config, launch, name) if config.log == "wandb" else None
        self.last: dict[str, Any] = {}
        for line in kept:
            self.last |= {key: value for key, value in line.items() if key != "schema" and value is not None}
        self.finish("running")

    def step(self, metrics: dict[str, Any]) -> None:
        """Append a step's metrics."""
        try:
            self._metrics.write(strict_json.dumps({"schema": SCHEMA, **metrics}) + "\n")
            self._metrics.flush()
        except OSError as error:  # what could not be written stays in the buffer until a later step's flush
            if not self._unwritten:
                print(f"warning: {self._metrics.name} cannot be written ({error}); the run goes on, and tries again.")
            self._unwritten = True
        else:
            self._unwritten = False
        of_one_step = ("counted", "skipped")
        self.last |= {key: value for key, value in metrics.items() if value is not None and key not in of_one_step}
        if self._wandb:
            shown = {key: value for key, value in metrics.items() if value is not None and key != "step"}
            try:
                self._wandb.log(shown, step=metrics["step"])
            except Exception as error:  # whatever it is, the run is worth more than its curves elsewhere
                print(f"Weights & Biases stopped logging ({error}); the run goes on, and its folder holds everything.")
                self._wandb = None

    def ledger(self, step: int, ranks: list[dict[str, Any]]) -> None:
        """Write what every rank held and sent in that step, in the place of what an earlier one did."""
        self._write(book.NAME, book.content(step, ranks))

    def finish(self, status: str, error: BaseException | None = None) -> None:
        """Write how the run stands; called at its start too, so that a killed run says 'running'."""
        why: dict[str, Any] = {"error": None}
        if status == "failed" and error:
            why = {"error": str(error), "traceback": "".join(traceback.format_exception(error))}
        self._write("summary.json", {"status": status, **why, **self.last})
        if status != "running":
            self._metrics.close()
            if self.target is not None and self.last:
                write_record(self.path, self.target)
            if self._wandb:
                _finish_wandb(self._wandb, 0 if status == "finished" else 1)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        partial = self.path / f".{name}.partial"
        partial.write_text(
            strict_json.dumps({"schema": SCHEMA, **content}, indent=2, default=str) + "\n", encoding="utf-8"
        )
        os.replace(partial, self.path / name)


def _lines_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a killed run up to a step; the last one may have been cut off in the middle."""
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if line["step"] <= step:
            kept.append(line)
    return kept


def environment() -> dict[str, Any]:
    """Versions, machine, command line and commit of this process."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "accelerate", "deepspeed", "triton", "numpy", "wandb"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": devices,
        "cuda": torch.version.cuda,
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, if it lies in one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _start_wandb(config: Config, launch: Launch, name: str) -> Any:
    """A Weights & Biases run; offline, with a line that says so, where there is no key. None where it cannot start."""
    try:
        import wandb
    except ImportError:
        print("wandb is not installed (pip install 'shardrun[logging]'): this run is logged to its folder only.")
        return None
    settings: dict[str, Any] = {
        "project": "shardrun",
        "name": name,
        "dir": config.out,
        "config": {**dataclasses.asdict(config), "launch": dataclasses.asdict(launch)},
    }
    if _wandb_key(wandb) or os.environ.get("WANDB_MODE"):
        try:
            return wandb.init(**settings, settings=wandb.Settings(silent=True, init_timeout=WANDB_TIMEOUT))
        except Exception as error:  # wandb.Error, or what a library below it raises
            reason = str(error).partition("\n")[0]
            print(f"Weights & Biases cannot be reached ({reason}): logging offline; wandb sync sends it later.")
    else:
        print("No Weights & Biases key (wandb login, or WANDB_API_KEY): logging offline; wandb sync sends it later.")
    try:
        return wandb.init(**settings, mode="offline", settings=wandb.Settings(silent=True))
    except Exception as error:
        print(f"Weights & Biases cannot start ({error}): this run is logged to its folder only.")
        return None


def _finish_wandb(run: Any, exit_code: int) -> None:
    """Send what has not been sent; a connection that is gone costs the run's end a bounded time and nothing else."""
    failures: list[Exception] = []

    def finish() -> None:
        try:
            import wandb

            run.finish(exit_code=exit_code)
            wandb.teardown()  # waits until wandb's own process has written everything
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=finish, name="wandb", daemon=True)
    thread.start()
    thread.join(WANDB_FINISH)
    if thread.is_alive() or failures:
        why = failures[0] if failures else f"no answer in {WANDB_FINISH} s"
        print(f"Weights & Biases did not get the end of this run ({why}); wandb sync sends what is kept in wandb/.")


def _wandb_key(wandb: Any) -> bool:
    """Whether there is a key: in the environment, or where `wandb login` keeps it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
