"""The capstones of lessons 4 to 7: every solution on 2 and 3 ranks, and every wrong version, with what it is told.

    python -m benchmarks.capstones [--lesson N] [--out benchmarks/capstones.md]

A wrong version is the solution with a passage replaced (a lesson's wrong.toml). It is refused where the level that it
is made for does not pass, in words that name the mistake. Ends with status 1 where anything does not hold, the table
written all the same. --lesson: one alone, whose part of the table is made anew.
"""

import argparse
import datetime
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from shardrun.lesson.capstone import RANKS
from shardrun.lesson.course import Lesson, course
from shardrun.lesson.judge import Outcome, judge_level
from shardrun.lesson.versions import wrong_versions
from shardrun.machine import cores, cpu_name

HEAD = """# The capstones, checked

`python -m benchmarks.capstones`: the solution of each capstone, level by level, and its classic wrong versions on two
ranks. Each must be refused by the level that it is made for, with words that name the mistake.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lesson", type=int, help="one lesson alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the table (.md)")
    arguments = parser.parse_args()
    held = True
    for lesson in course():
        if lesson.capstone and arguments.lesson in (None, lesson.number):
            part, holds = checked(lesson)
            held = held and holds
            write(arguments.out, f"## Lesson {lesson.number}: {lesson.capstone.name}\n", part)
    return int(not held)


def write(path: Path, heading: str, part: str) -> None:
    """Put a lesson's part in the place of the one that is there."""
    text = path.read_text(encoding="utf-8") if path.is_file() else HEAD
    parts = {found.partition("\n")[0] + "\n": found for found in re.split(r"(?m)^(?=## )", text)[1:]}
    parts[heading] = heading + part
    path.write_text("\n".join([HEAD, *(parts[key].rstrip("\n") + "\n" for key in sorted(parts))]), encoding="utf-8")


def checked(lesson: Lesson) -> tuple[str, bool]:
    """A lesson's part of the table, and whether all holds."""
    assert lesson.capstone
    started, held = time.perf_counter(), True
    rows = []
    for level in lesson.capstone.levels:
        cells = [level.name.partition(".")[2]]
        for ranks in RANKS:
            before = time.perf_counter()
            outcome = judge_level(lesson, level, lesson.folder / "by_hand.py", ranks)
            held = held and outcome.passed
            cells.append(f"{outcome.status}, {time.perf_counter() - before:.0f} s")
            print(f"{level.name} on {ranks} ranks: {cells[-1]} {outcome.message}", flush=True)
        rows.append(cells)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for version in wrong_versions(lesson):
            path = Path(folder) / "by_hand.py"
            path.write_text(version.text, encoding="utf-8")
            outcome = judge_level(lesson, version.level, path, RANKS[0])
            named = refused(outcome, version.says)
            held = held and named
            print(f"{'ok ' if named else 'NOT'} {version.name}: {outcome.status} {outcome.message}", flush=True)
            said = " ".join(outcome.message.split()).replace("|", "/")
            level_name = version.level.name.partition(".")[2]
            wrong.append([version.name, level_name, "yes" if named else f"NO ({outcome.status})", said])
    lines = [
        "",
        f"{datetime.date.today():%-d %B %Y}, {cpu_name()}, {cores()} cores, load average {os.getloadavg()[0]:.0f}; "
        f"torch {torch.__version__}, Python {platform.python_version()}; {time.perf_counter() - started:.0f} s in all.",
        "",
        "| level of the solution | " + " | ".join(f"{ranks} ranks" for ranks in RANKS) + " |",
        "|---|" + "---|" * len(RANKS),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "| wrong version | level | named | what it is told |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in wrong),
        "",
    ]
    return "\n".join(lines), held


def refused(outcome: Outcome, says: str) -> bool:
    return not outcome.passed and says in outcome.message


if __name__ == "__main__":
    sys.exit(main())
