"""What a run leaves: `runs/<name>/` with its configuration, environment, a line per step, its books and its end.

    config.json       everything resolved: the run's own fields, the launch, the accelerate config file as written
    environment.json  versions, machine, command line, commit
    metrics.jsonl     one line per step, flushed at once, so that a killed run is readable up to its last step; one
                      that was left out says "skipped", and in fp16 each says its loss_scale as the step has left it
    ledger.json       what every rank holds and sends, in bytes: predicted for the device, kernels, attention functions,
                    precision and torch's version under "predicted for", measured, and the remainder; on a GPU the
                    allocator's figures beside (speedrun/books/measured.py)
    summary.json      how it ended: 'running', 'finished', 'interrupted' (Ctrl-C), 'preempted' (SIGTERM and its like,
                      speedrun/run/signals.py) or 'failed', and the last figures; `status` of speedrun/run/writer.py
                      also tells 'died'
    history.json      which history of the run all this is (strategies/checkpoint/history.py)
    run.lock          who writes, while somebody does (speedrun/run/writer.py)
    record.txt, curves.png   of a run with a target: the record in the form of the public ones (speedrun/run/record.py)

Every file carries `schema`. Only rank 0 writes.
"""

import contextlib
import dataclasses
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from speedrun.config import Config
from speedrun.run.checkpoints import Resumed
from speedrun.run.forks import METRICS, history_of_start, holds_run, keep_damaged, lines_up_to, take_up
from speedrun.run.record import write_record
from speedrun.run.wandb_run import WandbRun, start_wandb
from strategies import strict_json
from strategies.ledger import book
from strategies.output import naming, why
from strategies.select import Launch

SCHEMA = 1


class RunFolder:
    """The folder of a run, which this process alone writes (speedrun/run/writer.py).

    resumed: None for a run from the beginning, which raises FileExistsError where the folder holds a run already. One
    that goes on changes nothing before `open`, which is to come when its checkpoint has been read.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        launch: Launch,
        preset: str,
        data_hash: str,
        parameters: int,
        resumed: Resumed | None = None,
    ):
        self.path, self.config, self.launch = path, config, launch
        self.continues = resumed.continues if resumed else None
        if self.continues is None and holds_run(path):
            raise FileExistsError(f"{path} holds a run already; give this one another --name, or remove the folder.")
        self.history = history_of_start(path, resumed)
        self.target = config.target_val_loss
        self._config = {
            "preset": preset,
            "run": dataclasses.asdict(config),
            "launch": dataclasses.asdict(launch),
            "data_hash": data_hash,
            "parameters": parameters,
            "resumed_at": self.continues,
        }
        self.last: dict[str, Any] = {}
        self._wandb: WandbRun | None = None
        self._metrics: TextIO | None = None
        self._opened = self._unwritten = False
        if resumed is None or (resumed.index is None and self.history.moving is None):  # nothing is there to be lost
            self.open()

    def open(self) -> list[str]:
        """Begin to write, after the lines that stay; returns what is to be said of it. Once it is open, no effect.

        Raises ValueError where the disk does not take it.
        """
        if self._opened:
            return []
        self._opened = True
        with naming(self.path):
            return self._open()

    def _open(self) -> list[str]:
        lines = self.path / METRICS
        self.path.mkdir(parents=True, exist_ok=True)
        last = max((line["step"] for line in lines_up_to(lines)), default=-1) if self.continues is not None else -1
        damaged = keep_damaged(lines) if self.continues is not None else ""
        self.history, said = take_up(self.path, self.history)
        kept = lines_up_to(lines, self.continues) if self.continues is not None else []
        self._write("config.json", self._config)
        self._write("environment.json", environment())
        if kept:  # in one move: a run killed just now keeps the lines that it had
            partial = self.path / ".metrics.jsonl.partial"
            partial.write_text("".join(strict_json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(partial, lines)
        self._metrics = open(lines, "a" if kept else "w", encoding="utf-8")  # noqa: SIM115
        if self.config.log == "wandb":
            self._wandb = start_wandb(self.path, self.history, last, self.config, self.launch)
        for line in kept:
            self.last |= {key: value for key, value in line.items() if key != "schema" and value is not None}
        self._write("summary.json", {"status": "running", "error": None, **self.last})
        return [line for line in (damaged, said) if line]

    def step(self, metrics: dict[str, Any]) -> None:
        """Append a step's metrics."""
        assert self._metrics
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
            self._wandb.log(metrics)

    def ledger(self, step: int, ranks: list[dict[str, Any]]) -> None:
        """Write what every rank held and sent in that step, in the place of what an earlier one did."""
        with self._warned(book.NAME):
            self._write(book.NAME, book.content(step, ranks))

    def finish(self, status: str, error: BaseException | None = None) -> None:
        """Write how the run has ended. A disk that does not take that is warned of: the run is over all the same.

        Of one that was to go on and failed before it did, the folder says what it said before.
        """
        if not self._opened:
            with suppress(OSError):
                (self.path / "checkpoints").rmdir()  # made for a saver that saved nothing
            return
        about: dict[str, Any] = {"error": None}
        if error and not (isinstance(error, KeyboardInterrupt) and status != "failed"):
            about = {"error": str(error), "traceback": "".join(traceback.format_exception(error))}
        with self._warned("summary.json"):
            self._write("summary.json", {"status": status, **about, **self.last})
        with self._warned(METRICS):
            if self._metrics:
                self._metrics.close()
        if self.target is not None and self.last:
            with self._warned("record.txt"):
                write_record(self.path, self.target)
        if self._wandb:
            self._wandb.finish(0 if status == "finished" else 1)

    def forget(self, step: int) -> None:
        """Let go of the line of this step, the last one: it is about to be written again, complete."""
        with naming(self.path):
            self._forget(step)

    def _forget(self, step: int) -> None:
        assert self._metrics
        self._metrics.close()
        lines = self.path / METRICS
        kept = lines_up_to(lines, step - 1)
        partial = self.path / ".metrics.jsonl.partial"
        partial.write_text("".join(strict_json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, lines)
        self._metrics = open(lines, "a", encoding="utf-8")

    def note(self, status: str, error: str | None) -> None:
        """Write how the run stands if nothing more comes; from any thread. It may go on, and end otherwise."""
        if self._opened:
            self._write("summary.json", {"status": status, "error": error, **self.last}, ".noted")

    def _write(self, name: str, content: dict[str, Any], partial: str = ".partial") -> None:
        """Write a JSON file whole or not at all."""
        path = self.path / f".{name}{partial}"
        try:
            path.write_text(
                strict_json.dumps({"schema": SCHEMA, **content}, indent=2, default=str) + "\n", encoding="utf-8"
            )
            os.replace(path, self.path / name)
        except OSError:
            with suppress(OSError):
                path.unlink()
            raise

    @contextlib.contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        """Say that a file of the run cannot be written, and go on: it is not the run."""
        try:
            yield
        except OSError as error:
            print(f"warning: {self.path / name} cannot be written ({why(error)}); what it says is older.", flush=True)


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
