"""Config files as people have them, launched for real: does a launch make of each what `shardrun explain` says?

    python -m benchmarks.configs_launched [--out benchmarks/configs_launched.md]

The entries of tests/configs that are marked `launch`, and those whose settings a run contradicts (`at_launch`):
on a CPU, one or two ranks, three steps. What is accepted has to train as the strategy, on the ranks and in the
precision that explain says. What is refused has to end with explain's sentence, and nothing started. Minutes. Ends
with status 1 where anything does not hold, the table written all the same.
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from shardrun.configs import resolve_config
from shardrun.launch import launching
from shardrun.machine import cores, cpu_name
from tests.configs import Entry, entries

OPTIONS = ["tiny", "--steps", "3", "--eval-every", "0", "--data.eval-tokens", "2048", "--untimed-steps", "0"]
OPTIONS += ["--data.global-batch", "8", "--progress", "plain", "--model.layers", "1", "--data.sequence-length", "32"]

HEADER = re.compile(r"tiny: [\d,]+ parameters, (\w+) on (\d+) ranks? \((cpu|gpu), (\w+)\)")


@dataclass(frozen=True)
class Outcome:
    """What became of one entry."""

    entry: Entry
    explained: str
    launched: str
    right: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the table (.md)")
    arguments = parser.parse_args()
    found = []
    for entry in entries():
        if entry.launch or entry.at_launch:
            with tempfile.TemporaryDirectory() as folder:
                found.append(compare(entry, Path(folder)))
            print(f"{entry.id}: {found[-1].launched}{'' if found[-1].right else '   <-- WRONG'}", flush=True)
    arguments.out.write_text(report(found, datetime.date.today()), encoding="utf-8")
    return int(not all(outcome.right for outcome in found))


def compare(entry: Entry, folder: Path, python: str | None = None) -> Outcome:
    """Explain and launch one entry, its files in `folder`. python: with which to launch, by default this one."""
    path = entry.write(folder)
    try:
        asked = resolve_config(path)
        explained = f"{asked.strategy} on {asked.world_size}, {asked.precision}"
    except (ValueError, FileNotFoundError) as error:
        explained = str(error)
    command = launching(path, ["-m", "speedrun.train", *OPTIONS, "--out", str(folder / "runs")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [python or command[0], *command[1:]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        stdin=subprocess.DEVNULL,
    )
    output = done.stdout + done.stderr
    header = HEADER.search(output)
    if done.returncode == 0 and header:
        strategy, ranks, _, precision = header.groups()
        launched = f"{strategy} on {ranks}, {precision}"
        right = launched == explained and "step:3/3" in output and not entry.at_launch
    else:
        said = re.search(r"shardrun: error: (.*)", output)
        launched = said.group(1).strip() if said else f"status {done.returncode}: {last_line(output)}"
        # accelerate itself ends some of them, in its own words; of ours there is one sentence, said by explain too
        by_accelerate = entry.accelerate_refuses and not said and done.returncode != 0
        right = "step:1/3" not in output and not header
        right &= by_accelerate or bool(said) and (launched == explained or entry.at_launch is not None)
    return Outcome(entry, explained.replace(f"{folder}/", ""), launched.replace(f"{folder}/", ""), bool(right))


def last_line(output: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip(" =")), "nothing")


def report(found: list[Outcome], day: datetime.date) -> str:
    """The table."""
    rows = [
        f"| {one.entry.id} | {one.explained} | {'the same' if one.launched == one.explained else one.launched} "
        f"| {'yes' if one.right else 'NO'} |"
        for one in found
    ]
    right = sum(one.right for one in found)
    return "\n".join(
        [
            "# Config files as people have them, explained and launched",
            "",
            f"`python -m benchmarks.configs_launched`, {day:%-d %B %Y}: {right} of {len(found)} right. {cpu_name()}, "
            f"{cores()} cores.",
            "",
            "The entries of tests/configs that are marked for it. A refusal of accelerate's own is in its words.",
            "",
            "| entry | `shardrun explain` | `accelerate launch` | right |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
