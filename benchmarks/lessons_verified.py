"""Every lesson verified whole: each attempt judged, each command of its README run, with all the steps of its demo.

    python -m benchmarks.lessons_verified [--out benchmarks/lessons_verified.md]

What `shardrun lesson verify` does, into a table; half an hour on two cores. The tests judge all attempts too, and leave
out some of the commands (tests/lessons/test_commands.py). Ends with status 1 where anything does not hold, the table
written all the same.
"""

import argparse
import datetime
import os
import platform
import sys
from pathlib import Path

import torch

from shardrun.lesson.course import Lesson, course
from shardrun.lesson.verify import Verified, verify_lesson
from shardrun.machine import cores, cpu_name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the table (.md)")
    arguments = parser.parse_args()
    os.environ.pop("SHARDRUN_LESSON_STEPS", None)  # whole demos
    found = []
    for lesson in course():
        found.append((lesson, verify_lesson(lesson)))
        print(f"lesson {lesson.number}: {found[-1][1]}", flush=True)
    arguments.out.write_text(report(found, datetime.date.today(), os.getloadavg()[0]), encoding="utf-8")
    return int(any(verified.problems for _, verified in found))


def report(found: list[tuple[Lesson, Verified]], day: datetime.date, load: float) -> str:
    """The table, and below it what does not hold."""
    rows = [
        f"| {lesson.number} | {lesson.title} | {one.attempts} | {one.commands} | {len(one.problems) or 'none'} "
        f"| {one.seconds:.0f} |"
        for lesson, one in found
    ]
    of_all = [one for _, one in found]
    problems = [f"- Lesson {lesson.number}: {problem}" for lesson, one in found for problem in one.problems]
    total = (
        f"| | all | {sum(one.attempts for one in of_all)} | {sum(one.commands for one in of_all)} "
        f"| {len(problems) or 'none'} | {sum(one.seconds for one in of_all):.0f} |"
    )
    return "\n".join(
        [
            "# Every lesson, verified whole",
            "",
            f"`python -m benchmarks.lessons_verified`, {day:%-d %B %Y}: each exercise unsolved at first, each solution "
            "passed,\neach wrong attempt told its mistake (together: attempts); then each command of the README but "
            "those for GPUs, with all\nthe steps of its demo. The seconds are of a run beside other work or not, as "
            "the load average tells.",
            "",
            f"{cpu_name()}, {cores()} cores, load average {load:.1f} at the end; torch {torch.__version__}, Python "
            f"{platform.python_version()}.",
            "",
            "| | lesson | attempts | commands | problems | seconds |",
            "|---|---|---:|---:|---:|---:|",
            *rows,
            total,
            "",
            *problems,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
