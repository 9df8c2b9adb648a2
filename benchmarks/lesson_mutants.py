"""Every mutant of every lesson's solutions, judged: those that pass stand in a table, each with its reason.

    python -m benchmarks.lesson_mutants [9 10 …] [--out benchmarks/lesson_mutants.md]

At every site of a solution one operator, constant, order, slice or statement is changed (shardrun/lesson/mutants.py).
A mutant that passes is an equal solution, and the lesson's mutants.toml says why; or the check lacks a case. Ends with
status 1 where a survivor is not explained. `shardrun lesson verify` tries a sample. A quarter of a second a mutant on a
quiet core, of Triton's interpreter several seconds; the rows of lessons that are not asked for stay as they are.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from shardrun.lesson.course import Exercise, Lesson, course
from shardrun.lesson.judge import judge
from shardrun.lesson.mutants import Mutant, equal_ones, mutants
from shardrun.lesson.verify import MUTANT_SECONDS

HEAD = """# Mutants of the lessons' solutions

`python -m benchmarks.lesson_mutants`: each solution with one operator, constant, order, slice or statement changed, at
every site. "Pass" are those that the check lets pass. Below the table stands each of them, with the reason why it is a
solution too (from the lesson's mutants.toml).

| lesson | exercise | mutants | pass | not explained |
|---:|---|---:|---:|---:|
"""

MISSING = "**Not explained.**"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="lessons (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the table (.md)")
    arguments = parser.parse_args()
    rows, survivors = read(arguments.out)
    unexplained = 0
    for lesson in course():
        if arguments.numbers and lesson.number not in arguments.numbers:
            continue
        for exercise in lesson.exercises:
            found, alive = judged(lesson, exercise)
            equal = equal_ones(lesson.folder).get(exercise.name, {})
            missing = [mutant for mutant in alive if mutant.change not in equal]
            unexplained += len(missing)
            key = (lesson.number, exercise.name)
            rows[key] = f"| {lesson.number} | {exercise.name} | {found} | {len(alive)} | {len(missing) or 'none'} |"
            survivors[key] = [
                f"- {lesson.number} {exercise.name}, line {m.line}: `{m.change}`. {equal.get(m.change, MISSING)}"
                for m in alive
            ]
            print(rows[key], *survivors[key], sep="\n", flush=True)
            arguments.out.write_text(report(rows, survivors), encoding="utf-8")
    return int(unexplained > 0)


def judged(lesson: Lesson, exercise: Exercise) -> tuple[int, list[Mutant]]:
    """How many mutants there are, and those that pass."""
    every = mutants(lesson.folder / "solution.py", exercise.name)
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        attempt = Path(folder) / "exercise.py"
        for mutant in every:
            attempt.write_text(mutant.text, encoding="utf-8")
            if judge(lesson, exercise, attempt, longest=MUTANT_SECONDS).passed:
                alive.append(mutant)
    return len(every), alive


Key = tuple[int, str]


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
    below = [line for key in sorted(rows) for line in survivors.get(key, [])]
    return HEAD + "\n".join([*(rows[key] for key in sorted(rows)), "", *below]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
