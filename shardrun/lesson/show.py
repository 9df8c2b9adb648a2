"""What the learner sees: within 100 columns, and 30 lines."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardrun.lesson.course import Exercise, Lesson
from shardrun.lesson.folder import Folder
from shardrun.tables import table

if TYPE_CHECKING:
    from shardrun.lesson.judge import Outcome

WIDTH = 98
SIGNS = {"passed": "✓", "unsolved": "·", "broken": "!"}


def is_terminal() -> bool:
    return sys.stdout.isatty()


def lessons(all_lessons: list[Lesson], folder: Folder) -> None:
    """The table of `list`."""
    rows = []
    for lesson in all_lessons:
        needs = ", ".join(map(str, lesson.prerequisites)) or "–"
        solved = f"{len(folder.solved_in(lesson))} of {len(lesson.exercises)}"
        here = "←" if folder.current == lesson.number else ""
        rows.append([f"{lesson.number:>2}  {lesson.title}", str(lesson.minutes), needs, solved, here])
    table("", ["lesson", "minutes", "needs", "solved", ""], rows)
    print(f"{_next(all_lessons, folder)}")


def progress(all_lessons: list[Lesson], folder: Folder) -> None:
    """A bar per lesson, and what comes next."""
    done = sum(len(folder.solved_in(lesson)) for lesson in all_lessons)
    total = sum(len(lesson.exercises) for lesson in all_lessons)
    print(f"{done} of {total} exercises solved, in {folder.path}\n")
    width = max(len(lesson.title) for lesson in all_lessons)
    for lesson in all_lessons:
        signs = "".join(_sign(lesson, e, folder) for e in lesson.exercises)
        unsolved = [e.name for e in lesson.exercises if e not in folder.solved_in(lesson)]
        rest = f"next: {unsolved[0]}" if folder.lesson(lesson).exists() and unsolved else ""
        print(f"{lesson.number:>3}  {lesson.title:<{width}} {signs:<9} {rest}".rstrip())
        for exercise in lesson.exercises:
            if folder.fails_now(lesson, exercise):
                print(f"     {exercise.name}: {once_solved(lesson, exercise, folder)}")
        if lesson.capstone and folder.lesson(lesson).exists():
            print(f"     {capstone_line(lesson, folder)}")
    print(f"\n{_next(all_lessons, folder)}")


def _sign(lesson: Lesson, exercise: Exercise, folder: Folder) -> str:
    if exercise not in folder.solved_in(lesson):
        return "·"
    return "▒" if folder.fails_now(lesson, exercise) else "█"


def once_solved(lesson: Lesson, exercise: Exercise, folder: Folder) -> str:
    """What is said of an exercise that was solved and does not pass now."""
    day = folder.day_solved(lesson, exercise)
    return f"solved on {day}, now failing" if day else "solved before, now failing"


def _next(all_lessons: list[Lesson], folder: Folder) -> str:
    """What to type next: in the current lesson, else the first unsolved one."""
    ordered = sorted(all_lessons, key=lambda lesson: lesson.number != folder.current)
    for lesson in ordered:
        if len(folder.solved_in(lesson)) < len(lesson.exercises):
            verb = "check" if folder.lesson(lesson).exists() else "start"
            return f"Next: shardrun lesson {verb} {lesson.number}"
    return "All is solved."


def progress_json(all_lessons: list[Lesson], folder: Folder) -> dict[str, Any]:
    """The same for programs."""
    return {
        "schema": 1,
        "folder": str(folder.path),
        "current": folder.current,
        "lessons": [
            {
                "number": lesson.number,
                "name": lesson.name,
                "title": lesson.title,
                "about": lesson.about,
                "minutes": lesson.minutes,
                "prerequisites": list(lesson.prerequisites),
                "started": folder.lesson(lesson).exists(),
                "exercises": [
                    {
                        "name": exercise.name,
                        "about": exercise.about,
                        "accounting": exercise.accounting,
                        "ranks": exercise.ranks,
                        "solved": exercise in folder.solved_in(lesson),
                        "solved_on": folder.day_solved(lesson, exercise) or None,
                        "failing": folder.fails_now(lesson, exercise),
                        "hints_shown": folder.hints.get(f"{lesson.name}/{exercise.name}", 0),
                        "solution_shown": f"{lesson.name}/{exercise.name}" in folder.solutions,
                    }
                    for exercise in lesson.exercises
                ],
                **_capstone_json(lesson, folder),
            }
            for lesson in all_lessons
        ],
    }


def _capstone_json(lesson: Lesson, folder: Folder) -> dict[str, Any]:
    if lesson.capstone is None:
        return {}
    return {
        "capstone": {
            "name": lesson.capstone.name,
            "about": lesson.capstone.about,
            "levels": [
                {
                    "name": level.name.partition(".")[2],
                    "about": level.about,
                    "solved": level in folder.levels_solved(lesson),
                    "solved_on": folder.day_solved(lesson, level) or None,
                    "failing": folder.fails_now(lesson, level),
                    "hints_shown": folder.hints.get(f"{lesson.name}/{level.name}", 0),
                }
                for level in lesson.capstone.levels
            ],
        }
    }


def started(lesson: Lesson, folder: Folder, made: list[Path], all_lessons: list[Lesson]) -> None:
    """What `start` did, and what to do next."""
    there = folder.lesson(lesson)
    head = f"Lesson {lesson.number}: {lesson.title} (about {lesson.minutes} minutes). {lesson.about}"
    print(textwrap.fill(head, WIDTH) + "\n")
    if made:
        print(f"Copied to {there}: {', '.join(path.name for path in made)}")
    else:
        print(f"{there} is there already and was left as it is.")
    for needed in (other for other in all_lessons if other.number in lesson.prerequisites):
        solved = len(folder.solved_in(needed))
        if solved < len(needed.exercises):
            print(f"It builds on lesson {needed.number}, {needed.title}: {solved} of {len(needed.exercises)} solved.")
    print(f"\n  1. Read       {there / 'README.md'}")
    print(f"  2. Run        python {there / 'demo.py'}")
    print(f"  3. Write      {there / 'exercise.py'}")
    print(f"  4. Check      shardrun lesson check {lesson.number}    (or watch, hint, solution)")
    print(f"     Or be shown it: shardrun present {lesson.number}\n")
    for exercise in lesson.exercises:
        ranks = f" (on {exercise.ranks} ranks)" if exercise.ranks > 1 else ""
        print(f"  · {exercise.name}: {exercise.about}{ranks}")
    if lesson.capstone:
        print(f"\nThen the capstone, {lesson.capstone.about}: {there / lesson.capstone.file}")
        print(f"  shardrun lesson check {lesson.number} {lesson.capstone.name}")


def outcome(exercise: Exercise, result: Outcome, before: str = "") -> None:
    """An exercise's line, and what is wrong below it; before: what is to be said of an earlier check."""
    head = f"  {SIGNS.get(result.status, '✗')} {exercise.name}: {exercise.about}"
    print(f"{head} ({before})" if before else head, flush=True)
    for line in result.message.splitlines():
        print(textwrap.fill(line, WIDTH, initial_indent="      ", subsequent_indent="      "), flush=True)


def unreadable(result: Outcome) -> None:
    """The file cannot be imported: said once, for all of its exercises."""
    print("  ✗ The file cannot be read, so none of its exercises can be checked:")
    for line in result.message.splitlines():
        print(textwrap.fill(line, WIDTH, initial_indent="      ", subsequent_indent="      "), flush=True)


def after_check(lesson: Lesson, folder: Folder, all_lessons: list[Lesson]) -> None:
    solved = len(folder.solved_in(lesson))
    print(f"\n{solved} of {len(lesson.exercises)} solved (✓ solved, ✗ wrong, · not begun).")
    left = [exercise for exercise in lesson.exercises if exercise not in folder.solved_in(lesson)]
    if failing := [exercise.name for exercise in lesson.exercises if folder.fails_now(lesson, exercise)]:
        print(textwrap.fill(f"Solved once, now failing: {', '.join(failing)}. What was solved stays solved.", WIDTH))
    if lesson.capstone and not left:
        print(capstone_line(lesson, folder))
    if left:
        print(f"Next: {left[0].name} (a hint: shardrun lesson hint {lesson.number} {left[0].name})")
    else:
        print(f"Lesson {lesson.number} is done. {_next(all_lessons, folder)}")


def capstone_line(lesson: Lesson, folder: Folder) -> str:
    """How far the capstone is, and how to go on with it."""
    assert lesson.capstone
    solved, levels = len(folder.levels_solved(lesson)), lesson.capstone.levels
    name = lesson.capstone.name
    how = f"shardrun lesson check {lesson.number} {name}" if solved < len(levels) else "done"
    return f"Capstone {name}: {solved} of {len(levels)} levels ({how})"


def hints(exercise: Exercise, shown: int) -> None:
    """The first so many hints, the last one new."""
    print(f"{exercise.name}: {exercise.about}")
    for number, hint in enumerate(exercise.hints[:shown], start=1):
        head = f"{number}. "
        print(textwrap.fill(hint, WIDTH, initial_indent=head, subsequent_indent=" " * len(head)))
    left = len(exercise.hints) - shown
    print(f"({left} more)" if left else "(the last one; what remains is shardrun lesson solution)")
