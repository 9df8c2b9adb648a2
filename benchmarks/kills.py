"""kill −9 at random moments: does every run resume, does its curve equal the uninterrupted one, is anything left over?

    python -m benchmarks.kills                       # 50 kills over the five strategies, about 20 minutes on two cores
    python -m benchmarks.kills --kills 3 --strategies ddp --out FILE.md

Each strategy trains a small model on two ranks with `--checkpoint.every 2 --resume auto`, once without a kill, then in
pieces: the same command again and again, each killed at a random moment. A third of the kills hit one rank, which
torchrun answers by ending the others; a third hit the launcher and every rank; a third the launcher alone, which leaves
its ranks orphaned. Half of the moments are drawn from the whole launch, imports and process group included, half are in
the middle of a save: right after a checkpoint began to be written.

After each kill every process must be gone in 30 s, and every checkpoint that has a name must verify, byte by byte. At
the end the run's lines (loss, gradient norm, validation loss per step) and its last checkpoint's tensors must be the
uninterrupted run's to the bit. Any difference ends the script with status 1 and its name.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from strategies import catalogue
from strategies.checkpoint.folder import checkpoints, find_checkpoint
from strategies.checkpoint.format import INDEX, read_index, read_sums
from strategies.checkpoint.load import verify_files

CONFIGS = Path(__file__).parents[1] / "accelerate_configs/cpu"
TARGETS = ("one rank", "all", "the launcher")
GONE = 30.0
"""Seconds after a kill in which every process must have ended."""

LIMIT = 900.0
"""Seconds in which an undisturbed run ends."""

STEPS = 400
RUN = (
    *("tiny", "--model.layers", "1", "--model.width", "48", "--model.heads", "3", "--model.mlp-width", "96"),
    *("--data.sequence-length", "32", "--data.global-batch", "4", "--data.eval-tokens", "320", "--eval-every", "100"),
    *("--untimed-steps", "0", "--checkpoint.every", "2", "--resume", "auto", "--name", "run"),
)


class Broken(Exception):
    """A run did not survive: the sentence says which and how."""


@dataclass
class Tally:
    """What happened to one strategy's run."""

    runs: int = 0
    kills: int = 0
    while_saving: int = 0
    before_training: int = 0
    by_target: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TARGETS, 0))
    longest: float = 0.0
    """Seconds until every process was gone."""


def start(strategy: str, out: Path, steps: int) -> subprocess.Popen[str]:
    """The launch, in a session of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--monitor_interval", "1"),
            *("--config_file", str(CONFIGS / f"{strategy}.yaml"), "-m", "speedrun.train", *RUN),
            *("--steps", str(steps), "--out", str(out)),
        ],
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=open(out / "stderr.txt", "a"),  # noqa: SIM115
        start_new_session=True,
    )


def wait(launcher: subprocess.Popen[str]) -> int:
    """For a run that nobody kills; returns its status. Raises Broken where it hangs."""
    try:
        return launcher.wait(LIMIT)
    except subprocess.TimeoutExpired:
        for process in reversed(processes_of(launcher)):
            process.kill()
        raise Broken(f"a run that nobody killed had not ended after {LIMIT:g} s") from None


def processes_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher, and every process below it by now."""
    try:
        process = psutil.Process(launcher.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_for_moment(
    launcher: subprocess.Popen[str], out: Path, chance: random.Random, launch_seconds: float
) -> list[psutil.Process]:
    """Until the random moment of this kill, or the run's end; returns the launcher and all below it."""
    if chance.random() < 0.5:
        deadline = time.monotonic() + chance.uniform(0, 1.3 * launch_seconds)
        while time.monotonic() < deadline and launcher.poll() is None:
            time.sleep(0.01)
        return processes_of(launcher)
    left = being_written(out)  # by the attempt before, which was killed
    skip = chance.randrange(1, 6)  # not always the first save after a start
    seen: set[str] = set()
    processes: list[psutil.Process] = []  # looked up beforehand: a save is over in milliseconds
    while launcher.poll() is None and len(seen) <= skip:
        time.sleep(0.001)
        seen |= being_written(out) - left
        if seen and not processes:
            processes = processes_of(launcher)
    return processes or processes_of(launcher)


def kill(launcher: subprocess.Popen[str], processes: list[psutil.Process], target: str, chance: random.Random) -> float:
    """kill −9; returns the seconds until nothing of the run was left. Raises Broken after 30."""
    ranks = [process for process in processes[1:] if is_rank(process)]
    if target == "one rank" and ranks:
        victims = [chance.choice(ranks)]
    elif target == "the launcher" and ranks:
        victims = [process for process in processes if process not in ranks]
    else:
        victims = processes
    began = time.monotonic()
    for victim in victims:
        with suppress(psutil.NoSuchProcess):  # it may just have ended by itself
            victim.kill()
    launcher_gone = False
    while time.monotonic() - began < GONE:
        launcher_gone = launcher_gone or launcher.poll() is not None
        alive = [process for process in processes if lives(process)]
        if launcher_gone and not alive:
            return time.monotonic() - began
        time.sleep(0.05)
    left = [process for process in processes if lives(process)]
    names = ", ".join(str(process.pid) for process in left)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    raise Broken(f"after kill -9 of {target}, processes {names} were still there after {GONE:g} s")


def is_rank(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ() and "speedrun.train" in process.cmdline()
    except psutil.Error:
        return False


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def figures(out: Path) -> tuple[list[tuple[Any, ...]], dict[str, str]]:
    """A finished run: its lines' figures, and the hash of every tensor file of its last checkpoint."""
    summary = json.loads((out / "run/summary.json").read_text())
    if summary["status"] != "finished":
        raise Broken(f"a run that was to end has the status {summary['status']}: {summary['error']}")
    lines = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    keys = ("step", "tokens", "train_loss", "grad_norm", "val_loss", "lr")
    sums = read_sums(find_checkpoint(out / "run"))
    tensors = {name: sha256 for name, sha256 in sums.items() if name != INDEX}  # the index holds times of its own run
    return [tuple(line.get(key) for key in keys) for line in lines], tensors


def being_written(out: Path) -> set[str]:
    """Checkpoints that have no name yet."""
    return {path.name for path in (out / "run" / "checkpoints").glob(".writing-*")}


def lines_of(out: Path) -> bytes:
    """The run's record of its steps, as far as there is one."""
    path = out / "run" / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


def drill(strategy: str, kills: int, steps: int, seed: int, folder: Path) -> Tally:
    """One strategy's runs, killed so many times; one that ends before is followed by another. Raises Broken."""
    chance = random.Random(f"{strategy} {seed}")
    whole = folder / "whole"
    whole.mkdir()
    began = time.monotonic()
    launcher = start(strategy, whole, steps)
    while not (whole / "run/checkpoints").is_dir() and launcher.poll() is None:
        time.sleep(0.05)
    launch_seconds = time.monotonic() - began
    wait(launcher)
    expected = figures(whole)
    tally = Tally()
    while tally.kills < kills:
        tally.runs += 1
        out = folder / f"killed_{tally.runs}"
        out.mkdir()
        ended = False
        while not ended and tally.kills < kills:
            ended = not killed_once(strategy, steps, out, chance, launch_seconds, tally)
            print(f"{strategy}: {tally.kills} of {kills} kills, {tally.while_saving} in a save", flush=True)
        if not ended and wait(start(strategy, out, steps)):
            raise Broken(f"the run did not end after its last resume: {(out / 'stderr.txt').read_text()[-2000:]}")
        lines, tensors = figures(out)
        for line, other in zip(lines, expected[0], strict=True):
            if line != other:
                raise Broken(f"step {line[0]} is {line}, and {other} in the uninterrupted run")
        if tensors != expected[1]:
            raise Broken("the last checkpoint's tensors are not the uninterrupted run's")
    return tally


def killed_once(
    strategy: str, steps: int, out: Path, chance: random.Random, launch_seconds: float, tally: Tally
) -> bool:
    """Start or resume the run in `out` and kill it at a random moment; False where it ended before. Raises Broken."""
    record, left = lines_of(out), being_written(out)
    launcher = start(strategy, out, steps)
    processes = wait_for_moment(launcher, out, chance, launch_seconds)
    if launcher.poll() is not None:
        return False
    target = TARGETS[tally.kills % 3]
    newest = max(checkpoints(out / "run/checkpoints"), default=0)
    tally.while_saving += bool(being_written(out) - left)
    tally.before_training += lines_of(out) == record
    tally.longest = max(tally.longest, kill(launcher, processes, target, chance))
    tally.by_target[target] += 1
    tally.kills += 1
    found = checkpoints(out / "run/checkpoints")
    if max(found, default=0) < newest:
        raise Broken(f"the checkpoint of step {newest} was lost")
    for path in found.values():
        verify_files(path, read_index(path))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all (default: 50)")
    parser.add_argument("--strategies", default=",".join(catalogue.spread()), help="comma-separated (default: all)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    arguments = parser.parse_args()
    names = arguments.strategies.split(",")
    rows = []
    for i, strategy in enumerate(names):
        kills = arguments.kills // len(names) + (i < arguments.kills % len(names))
        with tempfile.TemporaryDirectory() as folder:
            try:
                tally = drill(strategy, kills, arguments.steps, arguments.seed, Path(folder))
            except Broken as error:
                sys.exit(f"benchmarks.kills: {strategy}: {error}")
        targets = ", ".join(f"{target} {count}" for target, count in tally.by_target.items())
        rows.append(
            f"| {strategy} | {tally.kills} | {targets} | {tally.while_saving} | {tally.before_training} "
            f"| {tally.longest:.1f} s | equal to the bit |"
        )
    text = "\n".join(
        [
            "| strategy | kill −9 | of | while a save was being written | before its first step | longest to the end "
            "of all processes | curve and last checkpoint |",
            "|---|---:|---|---:|---:|---:|---|",
            *rows,
        ]
    )
    print(text)
    if arguments.out:
        command = f"python -m benchmarks.kills --kills {arguments.kills} --seed {arguments.seed}"
        arguments.out.write_text(
            f"# kill −9 at random moments\n\nTwo ranks, {arguments.steps} steps, a checkpoint every 2 "
            f"(`{command}`).\n\n{text}\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
