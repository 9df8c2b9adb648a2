"""`shardrun lesson check 4 my_ddp` and its like: a lesson's capstone, level by level, up to the first that fails."""

from pathlib import Path
from typing import TYPE_CHECKING

from shardrun.lesson import show
from shardrun.lesson.course import Capstone, Exercise, Lesson
from shardrun.lesson.folder import Folder, each_save
from strategies.errors import UserError

if TYPE_CHECKING:
    from shardrun.lesson.judge import Outcome

RANKS = (2, 3)
"""World sizes that a level is checked on: all that goes wrong with an odd one does with 3."""


def run(action: str, folder: Folder, lesson: Lesson, picture: bool = False) -> int:
    """action: check, watch, hint or solution; picture: of a check, what a step sends. Returns the exit status.

    Raises UserError where it cannot be done yet.
    """
    assert lesson.capstone
    if action == "check":
        return 0 if check(folder, lesson, lesson.capstone, picture) else 1
    if action == "watch":
        return _watch(folder, lesson, lesson.capstone)
    solved = folder.levels_solved(lesson)
    left = [level for level in lesson.capstone.levels if level not in solved]
    if action == "solution":
        if left:
            raise UserError(
                f"ours is shown when yours is done: {len(solved)} of {len(lesson.capstone.levels)} levels are; the "
                f"next hint is shardrun lesson hint {lesson.number} {lesson.capstone.name}."
            )
        print((lesson.folder / "by_hand.py").read_text(encoding="utf-8"), end="")
    elif not left:
        raise UserError(f"all levels of {lesson.capstone.name} are solved: there is nothing left to hint at.")
    else:
        show.hints(left[0], folder.next_hint(lesson, left[0]))
    return 0


def check(folder: Folder, lesson: Lesson, capstone: Capstone, picture: bool = False) -> bool:
    """Check the levels in order, tell and note; whether all passed. What was solved on another day stays solved."""
    from shardrun.lesson.rank import BROKEN, UNREADABLE

    attempt = folder.capstone(lesson)
    print(f"Lesson {lesson.number}, {capstone.about}: {attempt}", flush=True)
    passed = True
    for level in capstone.levels:
        outcome = judged(lesson, level, attempt)
        if outcome.status == UNREADABLE:
            show.unreadable(outcome)
            return False
        if outcome.status != BROKEN:  # a check that breaks says nothing of the attempt
            folder.mark(lesson, level, outcome.passed)
        failing = folder.fails_now(lesson, level)
        show.outcome(level, outcome, show.once_solved(lesson, level, folder) if failing else "")
        passed = passed and outcome.passed
        if not passed:
            break
    folder.current = lesson.number
    folder.save()
    if picture:
        from shardrun.lesson.messages.shown import show_capstone

        show_capstone(lesson, capstone, attempt)
    print(f"\n{show.capstone_line(lesson, folder)}")
    if passed:
        print(f"Ours: shardrun lesson solution {lesson.number} {capstone.name}")
        print(f"Beside the library's: shardrun compare --with {attempt}")
    else:
        print(f"A hint: shardrun lesson hint {lesson.number} {capstone.name}")
    return passed


def judged(lesson: Lesson, level: Exercise, attempt: Path) -> "Outcome":
    """The first outcome that is not a pass, with the ranks that it was on; else the last."""
    from shardrun.lesson.judge import Outcome, judge_level
    from shardrun.lesson.rank import UNSOLVED

    said: list[str] = []
    for ranks in RANKS:
        outcome = judge_level(lesson, level, attempt, ranks)
        if not outcome.passed:
            where = "" if outcome.status == UNSOLVED else f"With {ranks} ranks: "
            return Outcome(outcome.status, where + outcome.message)
        said += [outcome.message] if outcome.message else []
    return Outcome(outcome.status, "\n".join(said))


def _watch(folder: Folder, lesson: Lesson, capstone: Capstone) -> int:
    for _ in each_save(folder.capstone(lesson)):
        if check(folder, lesson, capstone):
            break
    return 0
