"""What a presentation runs: the lesson's demo.py, and the trainer, followed by the files that it writes anyway.

The trainer's run folder is all that the view knows: `config.json` (what was launched), `metrics.jsonl` (a line a step)
and `ledger.json` (the books of every rank, again every so many steps: `books_every`).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardrun.launch import find_config, launching, running, shipped_config, shipped_names, what_went_wrong
from shardrun.lesson.course import Lesson
from shardrun.present.record import Event
from shardrun.present.reference import under_ddp
from strategies.errors import UserError
from strategies.ledger import book

PICTURE = re.compile(r"^Picture: (.+)$", re.M)
"""What lessons.kit.save_figure says."""

BOOKS_EVERY = 5
"""Steps. Counting makes a step take up to twice as long."""

NOISE = ("real_accelerator.py",)
"""Lines with one of these are DeepSpeed's log, on stdout."""


@dataclass(frozen=True)
class Launched:
    """How a lesson's programs are started: accelerate configs, and how many ranks (None: as many as they say)."""

    lesson: Lesson
    demo: Path | None
    """None: demo.py runs in plain Python."""
    config: Path | None
    """Of the training; None: there is none."""
    processes: int | None

    @property
    def options(self) -> list[str]:
        return ["--num_processes", str(self.processes)] if self.processes else []


def launched(lesson: Lesson, config: str | None, processes: int | None) -> Launched:
    """With another config than the lesson's, or another number of ranks, where those are given.

    Raises ValueError for a config that there is not, and for a lesson without ranks.
    """
    live = lesson.live
    if not (live.demo or live.config) and (config or processes):
        raise UserError(f"lesson {lesson.number} is shown in one process; --config and --processes are for others.")
    if processes is not None and processes < 1:
        raise UserError(f"--processes is at least 1, not {processes}.")
    demo, training = (find_config(config or name) if name else None for name in (live.demo, live.config))
    return Launched(lesson, demo, training, processes)


class Script:
    """demo.py, running while the presentation goes on."""

    def __init__(self, folder: Path, command: str, process: subprocess.Popen[bytes], stop: Callable[[], None]):
        self.folder, self.command, self.process, self._stop = folder, command, process, stop
        self.started = time.monotonic()
        self.skipped = False

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def skip(self) -> None:
        """End it before its end; what it has printed stays."""
        self.skipped = self.running
        self._stop()

    def lines(self) -> list[str]:
        """What it has printed so far: whole lines, without those of the engines' logs."""
        text = (self.folder / "demo.out").read_text(encoding="utf-8", errors="replace")
        whole = text if not self.running else text[: text.rfind("\n") + 1]
        return [line.rstrip() for line in whole.splitlines() if not any(noise in line for noise in NOISE)]

    def output(self) -> Event:
        """What it printed, once it has ended; its pictures are copied beside it. Raises ValueError where it failed."""
        seconds = time.monotonic() - self.started
        status = self.process.wait()
        if status and not self.skipped:
            why = what_went_wrong(self.folder / "demo.err")
            raise UserError(f"{self.command} ended with status {status}: {why}")
        lines = self.lines()
        if self.skipped:
            lines += ["", f"(Skipped after {seconds:.0f} s: it was still running.)"]
        text = "\n".join(lines).strip("\n")
        figures = []
        for found in PICTURE.findall(text):
            if Path(found).is_file():
                figures.append(Path(found).name)
                shutil.copyfile(found, self.folder / Path(found).name)
        event = {"kind": "output", "command": self.command, "text": text, "figures": figures}
        return {**event, "seconds": round(seconds, 1)}


@contextmanager
def script(how: Launched, folder: Path) -> Iterator[Script]:
    """Start a lesson's demo.py, under accelerate launch where the lesson wants ranks for it."""
    path = how.lesson.folder / "demo.py"
    typed = f"learning/{how.lesson.name}/demo.py"
    if how.demo:
        command, text = launching(how.demo, [str(path)], how.options), f"{_launch(how.demo, how.options)} {typed}"
    else:
        command, text = [sys.executable, str(path)], f"python {typed}"
    with ExitStack() as open_:
        at_once = {**_environment(), "PYTHONUNBUFFERED": "1"}  # so that it can be shown while it comes
        started = running(command, folder / "demo.out", folder / "demo.err", at_once)
        yield Script(folder, text, open_.enter_context(started), open_.close)


@contextmanager
def training(how: Launched, folder: Path) -> Iterator[Iterator[Event | None]]:
    """Train the lesson's run on ranks; gives its events as they happen, and None now and then while nothing does.

    They raise ValueError, with the trainer's own sentence, where the run fails.
    """
    assert how.config
    arguments = [*how.lesson.live.arguments, "--books-every", str(BOOKS_EVERY)]
    quiet = ["--out", str(folder), "--name", "run", "--progress", "none"]
    log = folder / "run.log"
    command = launching(how.config, ["-m", "speedrun.train", *arguments, *quiet], how.options)
    text = shlex.join([*_launch(how.config, how.options).split(), "-m", "speedrun.train", *arguments])
    with running(command, log, added=_environment()) as process:
        yield _events(text, Follower(folder / "run"), process, log)


def _events(command: str, follower: "Follower", process: subprocess.Popen[bytes], log: Path) -> Iterator[Event | None]:
    started = time.monotonic()
    while True:
        ended = process.poll() is not None  # asked first: what is written before the end is read below
        for event in follower.new():
            if event["kind"] == "run":
                event["command"] = command
            yield {**event, "at": round(time.monotonic() - started, 3)}
        if ended:
            break
        yield None
        time.sleep(0.1)
    if process.returncode:
        raise UserError(f"{command} ended with status {process.returncode}: {what_went_wrong(log)} (see {log}).")


@dataclass
class Follower:
    """Reads what a run has added to its folder since it was last asked."""

    run: Path
    _begun: bool = False
    _read: int = 0
    _books: tuple[int, ...] = field(default=())

    def new(self) -> list[Event]:
        """In the order in which the trainer writes: the launch, then for each step its books, if any, and its line."""
        found: list[Event] = []
        if not self._begun and (config := _json(self.run / "config.json")):
            self._begun = True
            launch = {key: config["launch"][key] for key in ("strategy", "world_size", "precision", "cpu")}
            steps = config["run"]["steps"]
            found.append({"kind": "run", **launch, "steps": steps, "parameters": config["parameters"]})
            if ddp := under_ddp(config):
                found.append({"kind": "whole", "memory": ddp})
        lines = self._lines()  # before the books, which then are at least as new
        ledger = self.run / book.NAME
        if self._begun and ledger.is_file() and (books := self._new_books(ledger)):
            found.append({"kind": "books", "step": books["step"], "ranks": books["ranks"]})
        return found + [{"kind": "step", **line} for line in lines]

    def _new_books(self, ledger: Path) -> dict[str, Any] | None:
        """They are replaced as a whole: another file each time."""
        status = ledger.stat()
        stamp = (status.st_ino, status.st_mtime_ns)
        if stamp == self._books:
            return None
        self._books = stamp
        return _json(ledger)

    def _lines(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl; one that is still being written comes next time."""
        path = self.run / "metrics.jsonl"
        if not self._begun or not path.is_file():
            return []
        with open(path, "rb") as file:
            file.seek(self._read)
            added = file.read()
        added = added[: added.rfind(b"\n") + 1]
        self._read += len(added)
        return [json.loads(line) for line in added.splitlines()]


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _launch(config: Path, options: list[str]) -> str:
    """As the lessons' READMEs write it: `shardrun lesson start` copies the shipped configs into learning/."""
    name = next((name for name in shipped_names() if shipped_config(name) == config), None)
    path = f"learning/accelerate_configs/{name}.yaml" if name else str(config)
    return " ".join(["accelerate launch --config_file", path, *options])


def _environment() -> dict[str, str]:
    """So that demo.py, which lies in a folder of its own, finds the packages in a checkout too."""
    root = str(Path(__file__).parent.parent.parent)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}
