"""Signals × moments × strategies: what is lost, how a run ends, and whether anything is left over.

    python -m benchmarks.signals                          # about 110 launches, half an hour on two cores
    python -m benchmarks.signals --strategies zero2 --moments step,save --out FILE.md

Each launch is a small run on two ranks (single: one process without a launcher), whose moment is made long
(benchmarks/signals_rank.py). The signal comes 0.3 s after that moment has begun. Then every process must be gone, and

- until the first step there is nothing to lose: the run has no step, or those that it went on from;
- after that the step in flight is the last one of the record, and it is saved;
- a run that has done all its steps is finished.

Any difference stands in its cell, and the script then ends with status 1. SIGTERM comes at every moment, every other
signal in the middle of a step: to the launcher where torchrun passes it on, else to the ranks, as Slurm sends it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.signals_rank import LONG, SAVE, STEP
from strategies.checkpoint.folder import checkpoints
from strategies.checkpoint.format import read_index
from strategies.checkpoint.load import verify_files

CONFIGS = Path(__file__).parents[1] / "accelerate_configs/cpu"
STRATEGIES = ("single", "ddp", "fsdp", "zero2", "zero3")
MOMENTS = ("imports", "start", "warm-up", "compile", "resume", "step", "validation", "save", "end")
BEFORE = ("imports", "start", "warm-up", "compile", "resume")
"""Moments in which no step has been done."""

STEPS, RESUMED = 12, 3
DEFAULTS = {
    signal.SIGINT: signal.default_int_handler, signal.SIGQUIT: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL,
}  # fmt: skip
"""What they do in a terminal; in the background a shell, and nohup, let some of them be ignored."""
GONE = 29.0
"""Seconds after the signal in which every process must have ended: torchrun kills after 30."""

RUN = (
    *("tiny", "--model.layers", "1", "--model.width", "48", "--model.heads", "3", "--model.mlp-width", "96"),
    *("--data.sequence-length", "32", "--data.global-batch", "4", "--data.micro-batch", "1"),
    *("--data.eval-tokens", "1280"),
    *("--untimed-steps", "1", "--resume", "auto", "--name", "run"),
)


class Broken(Exception):
    """A run did not end as it should: the sentence says which and how."""


@dataclass(frozen=True)
class Case:
    """A signal at a moment. to: launcher, group (the launcher and all below it), ranks, or one rank."""

    moment: str
    name: str
    to: str
    nohup: bool = False

    def __str__(self) -> str:
        where = {"launcher": "the launcher", "group": "all at once", "ranks": "the ranks", "one rank": "one rank"}
        return f"{self.moment} | {self.name} | {where[self.to]}{', under nohup' if self.nohup else ''}"


CASES = (
    *(Case(moment, "SIGTERM", "launcher") for moment in MOMENTS),
    *(Case("step", name, "launcher") for name in ("SIGINT", "SIGHUP", "SIGQUIT")),
    *(Case("step", name, "ranks") for name in ("SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGPWR")),
    *(Case("validation", name, "one rank") for name in ("SIGTERM", "SIGUSR1")),
    *(Case("save", name, "group") for name in ("SIGHUP", "SIGINT")),
    Case("compile", "SIGTERM", "group"),
    Case("step", "SIGHUP", "group", nohup=True),
    Case("step", "SIGUSR1", "launcher"),
)


def start(strategy: str, case: Case | None, out: Path, steps: int = STEPS) -> subprocess.Popen[str]:
    """The launch, in a session of its own. Without a case nothing happens to it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if case and case.moment == "compile":  # with nothing compiled before
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(out / "compiled")
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--monitor_interval", "1"]
    launcher += ["--config_file", str(CONFIGS / f"{strategy}.yaml")]
    moment = case.moment if case else "none"
    every = STEP if moment == "validation" else 0
    command = [
        *(["nohup"] if case and case.nohup else []),
        *(sys.executable, *([] if strategy == "single" else launcher), "-m", "benchmarks.signals_rank"),
        *(moment, str(out / "moment"), *RUN, "--steps", str(steps), "--out", str(out), "--eval-every", str(every)),
        *("--checkpoint.every", str(SAVE if moment == "save" else 100)),
        *(["--compile"] if moment == "compile" else []),
    ]
    log = open(out / "log.txt", "a")  # noqa: SIM115
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


def signalled(strategy: str, case: Case, out: Path) -> str:
    """One launch and its signal; returns the table's cell. Raises Broken."""
    if case.moment == "resume" and start(strategy, None, out, RESUMED).wait(120):
        raise Broken(f"the run to go on from failed: {(out / 'log.txt').read_text()[-2000:]}")
    launcher = start(strategy, case, out)
    deadline = time.monotonic() + 120
    while not (out / "moment").exists():
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise Broken(f"the moment did not come: {(out / 'log.txt').read_text()[-2000:]}")
        time.sleep(0.02)
    time.sleep(LONG / 2 if case.moment == "compile" else 0.3)
    process = psutil.Process(launcher.pid)
    processes = [process, *process.children(recursive=True)]
    began = time.monotonic()
    send(case, launcher.pid, ranks_of(processes, strategy))
    status = launcher.wait(60)
    _, alive = psutil.wait_procs(processes, timeout=max(1.0, GONE - (time.monotonic() - began)))
    seconds = time.monotonic() - began
    for left in alive:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    if alive or seconds > GONE:
        raise Broken(f"{len(alive)} processes were still there after {GONE:g} s")
    how = outcome(case, out, goes_on=strategy == "single" and case.nohup)
    own = len([line for line in (out / "log.txt").read_text().splitlines() if line.startswith("shardrun: ")])
    if strategy == "single" and not 1 <= own <= 3 and not case.nohup:
        raise Broken(f"it said {own} sentences")
    return f"{how}; exit {status}, {seconds:.1f} s"


def ranks_of(processes: list[psutil.Process], strategy: str) -> list[psutil.Process]:
    if strategy == "single":
        return processes[:1]
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if "RANK" in process.environ() and "benchmarks.signals_rank" in process.cmdline():
                found.append(process)
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


def send(case: Case, launcher: int, ranks: list[psutil.Process]) -> None:
    number = getattr(signal, case.name)
    if case.to == "launcher":
        os.kill(launcher, number)
    elif case.to == "group":
        os.killpg(launcher, number)
    else:
        for rank in ranks if case.to == "ranks" else ranks[-1:]:
            rank.send_signal(number)


def outcome(case: Case, out: Path, goes_on: bool) -> str:
    """How the folder says that it ended. Raises Broken where more than the step in flight is lost.

    goes_on: nothing was to happen, as to one process under nohup.
    """
    folder = out / "run"
    summary: dict[str, Any] = {}
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
    text = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
    lines = [json.loads(line)["step"] for line in text.splitlines()]
    found = checkpoints(folder / "checkpoints")
    for path in found.values():
        verify_files(path, read_index(path))
    status, last, saved = summary.get("status"), max(lines, default=0), max(found, default=0)
    ended = "interrupted" if case.name == "SIGINT" else "preempted"
    if lines != list(range(len(lines))):
        raise Broken(f"its record has the steps {lines}")
    if case.moment in BEFORE:
        first = RESUMED if case.moment == "resume" else 0
        if (last, saved) != (first, first) or status not in (None, ended, "finished" if first else None):
            raise Broken(f"{status}, step {last}, saved {saved}")
        return f"{status or 'no folder'}, {last} / {saved}"
    if case.moment == "end" or goes_on:
        if (status, last, saved) != ("finished", STEPS, STEPS):
            raise Broken(f"{status}, step {last}, saved {saved}")
        return f"finished, {last} / {saved}"
    least, most = STEP, STEP
    if case.moment == "save":  # training goes on beside it, until the next save waits for this one
        least, most = SAVE, 2 * SAVE + 1
    if status != ended or last != saved or not least <= last <= most:
        raise Broken(f"{status}, step {last}, saved {saved}")
    return f"{status}, {last} / {saved}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="comma-separated (default: all)")
    parser.add_argument("--moments", default=",".join(MOMENTS), help="comma-separated (default: all)")
    parser.add_argument("--cases", type=int, nargs=2, default=(0, len(CASES)), help="first and last+1 of the list")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    arguments = parser.parse_args()
    strategies, moments = arguments.strategies.split(","), arguments.moments.split(",")
    for number, handler in DEFAULTS.items():  # what a launch inherits
        signal.signal(number, handler)
    rows, broken = [], 0
    for case in CASES[slice(*arguments.cases)]:
        cells = []
        for strategy in strategies if case.moment in moments else ():
            if (case.moment == "compile" and strategy == "zero3") or (strategy == "single" and case.to == "one rank"):
                cells.append("–")  # ZeRO-3 is not compiled
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    cells.append(signalled(strategy, case, Path(folder)))
                except Broken as error:
                    cells.append(f"**{str(error).splitlines()[0]}**")
                    broken += 1
                    print(error)
            print(f"{strategy}: {case}: {cells[-1]}", flush=True)
        if cells:
            rows.append(f"| {case} | {' | '.join(cells)} |")
    text = "\n".join(
        [
            f"| moment | signal | to | {' | '.join(strategies)} |",
            f"|---|---|---|{'---|' * len(strategies)}",
            *rows,
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(
            "# Signals, moments, strategies\n\n"
            f"Two ranks, {STEPS} steps. In a cell: the status in `summary.json`, the last step of the record / the "
            "last checkpoint, the launcher's exit status, and the seconds until every process was gone "
            "(`python -m benchmarks.signals`). "
            + ("" if broken else "No process was left over, and none lost more than the step in flight.\n")
            + f"Moments of training are in step {STEP}; a run that goes on does so from step {RESUMED}.\n\n{text}\n",
            encoding="utf-8",
        )
    if broken:
        sys.exit(f"benchmarks.signals: {broken} of them did not end as they should")


if __name__ == "__main__":
    main()
