"""Mutants of every lesson's solutions, judged: those that pass stand in a table, each with its reason.

    python -m benchmarks.lesson_mutants [9 10 …] [--again] [--out benchmarks/lesson_mutants.md]

At a site of a solution one operator, constant, order, slice or statement is changed (shardrun/lesson/mutants.py). Every
site has its turn; where there are fewer than 30, some have two or more. A mutant that passes is an equal solution, and
the lesson's mutants.toml says why; or the check lacks a case. Ends with status 1 where a survivor is not explained.
`shardrun lesson verify` tries a sample. A fork and a third of a second each, on a quiet core. The table is written
after every exercise, and an exercise whose row is that of its present mutants is left out, unless --again.
"""

import argparse
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from shardrun.lesson.course import Exercise, Lesson, course
from shardrun.lesson.judge import judge
from shardrun.lesson.mutants import Mutant, chosen, equal_ones, mutants

TABLE = Path(__file__).with_suffix(".md")
HEAD = """# Mutants of the lessons' solutions

`python -m benchmarks.lesson_mutants`: each solution with one operator, constant, order, slice or statement changed.
Every site is changed once; where there are fewer than 30 sites, some are changed in two ways or more. "Pass" are the
mutants that the check lets pass. Below the table stands each of them, with the reason why it is a solution too (from
the lesson's `mutants.toml`).

"""
COLUMNS = """| lesson | exercise | sites | mutants | pass | not explained |
|---:|---|---:|---:|---:|---:|
"""

MISSING = "**Not explained.**"

Key = tuple[int, str]
"""A lesson's number, and its exercise."""


@dataclass(frozen=True)
class Row:
    """sites, mutants: how many were tried; alive: (line, change) of those that pass."""

    sites: int
    mutants: int
    alive: tuple[tuple[int, str], ...] = ()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="lessons (default: all)")
    parser.add_argument("--again", action="store_true", help="also exercises that have a row")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table (.md)")
    arguments = parser.parse_args()
    rows = read(arguments.out)
    for lesson in course():
        for exercise in lesson.exercises:
            key, tried = (lesson.number, exercise.name), tried_of(lesson, exercise)
            if arguments.numbers and lesson.number not in arguments.numbers:
                continue
            if key in rows and replace(rows[key], alive=()) == row(tried) and not arguments.again:
                continue
            rows[key] = replace(row(tried), alive=tuple((m.line, m.change) for m in judged(lesson, exercise, tried)))
            print(f"{lesson.number} {exercise.name}: {rows[key]}", flush=True)
            arguments.out.write_text(report(rows), encoding="utf-8")
    arguments.out.write_text(report(rows), encoding="utf-8")
    return int(MISSING in report(rows))


def tried_of(lesson: Lesson, exercise: Exercise) -> list[Mutant]:
    return chosen(mutants(lesson.folder / "solution.py", exercise.name))


def row(tried: list[Mutant]) -> Row:
    """The row of these mutants, before any is judged."""
    return Row(len({mutant.site for mutant in tried}), len(tried))


def judged(lesson: Lesson, exercise: Exercise, tried: list[Mutant]) -> list[Mutant]:
    """The mutants that pass."""
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        attempt = Path(folder) / "exercise.py"
        for mutant in tried:
            attempt.write_text(mutant.text, encoding="utf-8")
            if judge(lesson, exercise, attempt, quick=True).passed:
                alive.append(mutant)
    return alive


def read(table: Path) -> dict[Key, Row]:
    """The rows of an earlier run, with their survivors."""
    text = table.read_text(encoding="utf-8") if table.is_file() else ""
    alive: dict[Key, list[tuple[int, str]]] = {}
    for number, name, line, change in re.findall(r"^- (\d+) (\w+), line (\d+): `(.+)`\. ", text, re.M):
        alive.setdefault((int(number), name), []).append((int(line), change))
    rows: dict[Key, Row] = {}
    for number, name, sites, count in re.findall(r"^\| (\d+) \| (\w+) \| (\d+) \| (\d+) \|", text, re.M):
        key = (int(number), name)
        rows[key] = Row(int(sites), int(count), tuple(alive.get(key, ())))
    return rows


def report(rows: dict[Key, Row]) -> str:
    """The table, what is not in it, and each survivor with its reason as mutants.toml has it now."""
    lines, below, left = [], [], []
    for lesson in course():
        for exercise in lesson.exercises:
            key = (lesson.number, exercise.name)
            if key not in rows:
                left.append(key)
                continue
            found, equal = rows[key], equal_ones(lesson.folder).get(exercise.name, {})
            missing = sum(change not in equal for _, change in found.alive) or "none"
            numbers = f"{found.sites} | {found.mutants} | {len(found.alive)} | {missing}"
            lines.append(f"| {lesson.number} | {exercise.name} | {numbers} |")
            below += [
                f"- {lesson.number} {exercise.name}, line {line}: `{change}`. {equal.get(change, MISSING)}"
                for line, change in found.alive
            ]
    text = HEAD + COLUMNS + "\n".join(lines) + "\n"
    if left:
        begun = {number for number, _ in rows}
        whole = sorted({number for number, _ in left} - begun)
        parts = [f"{name} of lesson {number}" for number, name in left if number in begun]
        lessons = [f"lessons {', '.join(map(str, whole))}"] if whole else []
        text += f"\nNot judged yet: {'; '.join([*lessons, *parts])}.\n"
    return text + ("\n" + "\n".join(below) + "\n" if below else "")


if __name__ == "__main__":
    sys.exit(main())
