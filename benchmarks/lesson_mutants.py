"""Mutants of every lesson's solutions, judged: those that pass stand in a table, each with its reason.

    python -m benchmarks.lesson_mutants [9 10 …] [--again] [--out benchmarks/lesson_mutants.md]

At a site of a solution one operator, constant, order, slice or statement is changed (shardrun/lesson/mutants.py). Every
site has its turn; where there are fewer than 30, some have two or more. A mutant that passes is an equal solution, and
the lesson's mutants.toml says why; or the check lacks a case. Ends with status 1 where a survivor is not explained.
`shardrun lesson verify` tries a sample. A fork and a third of a second each, on a quiet core. The table is written
after every exercise, and an exercise whose row is that of its present mutants is left out, unless --again.
"""

import argparse
import sys
import tempfile
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="lessons (default: all)")
    parser.add_argument("--again", action="store_true", help="also exercises that have a row")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table (.md)")
    arguments = parser.parse_args()
    rows, survivors = read(arguments.out)
    for lesson in course():
        for exercise in lesson.exercises:
            key, tried = (lesson.number, exercise.name), tried_of(lesson, exercise)
            if arguments.numbers and lesson.number not in arguments.numbers:
                continue
            if key in rows and rows[key].startswith(row(key, tried)) and not arguments.again:
                continue
            alive = judged(lesson, exercise, tried)
            equal = equal_ones(lesson.folder).get(exercise.name, {})
            missing = sum(mutant.change not in equal for mutant in alive)
            rows[key] = row(key, tried) + f"{len(alive)} | {missing or 'none'} |"
            survivors[key] = [
                f"- {lesson.number} {exercise.name}, line {m.line}: `{m.change}`. {equal.get(m.change, MISSING)}"
                for m in alive
            ]
            print(rows[key], *survivors[key], sep="\n", flush=True)
            arguments.out.write_text(report(rows, survivors), encoding="utf-8")
    return int(any(MISSING in line for lines in survivors.values() for line in lines))


def tried_of(lesson: Lesson, exercise: Exercise) -> list[Mutant]:
    return chosen(mutants(lesson.folder / "solution.py", exercise.name))


def row(key: Key, tried: list[Mutant]) -> str:
    """How the row of these mutants begins."""
    return f"| {key[0]} | {key[1]} | {len({mutant.site for mutant in tried})} | {len(tried)} | "


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


def read(table: Path) -> tuple[dict[Key, str], dict[Key, list[str]]]:
    """The rows and survivors of an earlier run."""
    rows: dict[Key, str] = {}
    survivors: dict[Key, list[str]] = {}
    for line in table.read_text(encoding="utf-8").splitlines() if table.is_file() else []:
        parts = line.replace("|", " ").replace(",", " ").split()
        if line.startswith("| ") and parts[0].isdigit():
            rows[int(parts[0]), parts[1]] = line
        elif line.startswith("- ") and parts[1].isdigit():
            survivors.setdefault((int(parts[1]), parts[2]), []).append(line)
    return rows, survivors


def report(rows: dict[Key, str], survivors: dict[Key, list[str]]) -> str:
    every = [(lesson.number, exercise.name) for lesson in course() for exercise in lesson.exercises]
    below = [line for key in every for line in survivors.get(key, [])]
    table = HEAD + COLUMNS + "\n".join(rows[key] for key in every if key in rows) + "\n"
    if left := [key for key in every if key not in rows]:
        begun = {number for number, _ in rows}
        whole = sorted({number for number, _ in left} - begun)
        parts = [f"{name} of lesson {number}" for number, name in left if number in begun]
        lessons = [f"lessons {', '.join(map(str, whole))}"] if whole else []
        table += f"\nNot judged yet: {'; '.join([*lessons, *parts])}.\n"
    return table + ("\n" + "\n".join(below) + "\n" if below else "")


if __name__ == "__main__":
    sys.exit(main())
