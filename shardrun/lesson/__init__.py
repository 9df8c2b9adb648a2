"""`shardrun lesson`: the lessons, the learner's copies of them, checks, hints and progress.

The learner works in a folder, `learning` by default, in which `start` puts copies; nothing there is ever overwritten.
"""

import argparse
from pathlib import Path

from shardrun.help import add_parser
from shardrun.lesson import capstone, show
from shardrun.lesson.course import Exercise, Lesson, course, find_lesson
from shardrun.lesson.folder import Folder, each_save, open_folder, reset, start
from shardrun.lesson.source import function_source
from strategies import strict_json
from strategies.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="the learner's folder (default: the one we are in, or ./learning)")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, about: str) -> argparse.ArgumentParser:
        return add_parser(actions, name, about)

    for name, about in (
        ("list", "the lessons, in order, and what is solved"),
        ("progress", "what is solved, and what comes next"),
    ):
        action(name, about).add_argument("--json", action="store_true", help="print JSON")
    number = {"type": int, "metavar": "N", "help": "the lesson's number"}
    action("start", "copy a lesson into the learner's folder").add_argument("number", **number)  # type: ignore[arg-type]
    for name, about in (
        ("check", "check your solutions: what is right, and what is wrong with the others"),
        ("watch", "check again whenever exercise.py is saved; Ctrl-C ends it"),
        ("hint", "the next hint"),
        ("solution", "one way to solve an exercise"),
        ("reset", "put the unsolved exercises back; yours are kept beside them"),
    ):
        parts = action(name, about)
        parts.add_argument("number", nargs="?", **{**number, "help": "the lesson's number (default: the current one)"})  # type: ignore[arg-type]
        if name == "check":
            parts.add_argument(
                "--show",
                action="store_true",
                help="draw the messages that your code sends, rank by rank, beside the solution's; also as an SVG file",
            )
        if name != "reset":
            parts.add_argument("exercise", nargs="?", help="one exercise of it, or its capstone (my_ddp)")
    verify = action("verify", "for CI: do the lessons themselves hold what they promise?")
    verify.add_argument("numbers", nargs="*", type=int, metavar="N", help="lessons (default: all)")
    verify.add_argument("--no-commands", action="store_true", help="leave out the commands of the READMEs")


def run(arguments: argparse.Namespace) -> int:
    if arguments.action == "verify":
        from shardrun.lesson.verify import verify

        return verify([find_lesson(n) for n in arguments.numbers] or course(), commands=not arguments.no_commands)
    folder = open_folder(arguments.folder)
    if arguments.action in ("list", "progress"):
        lessons = course()
        if arguments.json:
            print(strict_json.dumps(show.progress_json(lessons, folder), indent=2))
        else:
            (show.lessons if arguments.action == "list" else show.progress)(lessons, folder)
        return 0
    if arguments.action == "start":
        lesson = find_lesson(arguments.number)
        show.started(lesson, folder, start(folder, lesson), course())
        return 0
    lesson = _lesson(folder, arguments.number)
    if arguments.action == "reset":
        print(f"The exercises of lesson {lesson.number} are unsolved again; yours are in {reset(folder, lesson)}.")
        return 0
    if lesson.capstone and (arguments.exercise or "").partition(".")[0] == lesson.capstone.name:
        return capstone.run(arguments.action, folder, lesson, getattr(arguments, "show", False))
    if arguments.action == "check":
        return 0 if _check(folder, lesson, _exercises(lesson, arguments.exercise), arguments.show) else 1
    if arguments.action == "watch":
        return _watch(folder, lesson, arguments.exercise)
    exercise = _one(folder, lesson, arguments.exercise)
    if arguments.action == "hint":
        show.hints(exercise, folder.next_hint(lesson, exercise))
    else:
        _solution(folder, lesson, exercise)
    return 0


def _lesson(folder: Folder, number: int | None) -> Lesson:
    """The lesson of that number, or the current one. Raises ValueError where none has been started."""
    if number is None:
        number = folder.current
    if number is None:
        raise UserError("no lesson has been started here; begin with: shardrun lesson start 1")
    return find_lesson(number)


def _exercises(lesson: Lesson, name: str | None) -> list[Exercise]:
    return [lesson.exercise(name)] if name else list(lesson.exercises)


def _one(folder: Folder, lesson: Lesson, name: str | None) -> Exercise:
    """The exercise of that name, or the first unsolved one. Raises ValueError where all are solved."""
    if name:
        return lesson.exercise(name)
    for exercise in lesson.exercises:
        if exercise not in folder.solved_in(lesson):
            return exercise
    names = ", ".join(exercise.name for exercise in lesson.exercises)
    raise UserError(f"all exercises of lesson {lesson.number} are solved; name the one you mean: {names}.")


def _check(folder: Folder, lesson: Lesson, exercises: list[Exercise], pictures: bool = False) -> bool:
    """Check, tell and note; whether all that was checked passed. pictures: of what each sends, too."""
    from shardrun.lesson.judge import judge
    from shardrun.lesson.rank import BROKEN, UNREADABLE

    attempt = folder.attempt(lesson)
    passed = True
    print(f"Lesson {lesson.number}, {lesson.title}: {attempt}", flush=True)
    for exercise in exercises:
        recorded = pictures and exercise.ranks > 1
        outcome = judge(lesson, exercise, attempt, record=True) if recorded else judge(lesson, exercise, attempt)
        passed = passed and outcome.passed
        if outcome.status == UNREADABLE:
            show.unreadable(outcome)
            break
        if outcome.status != BROKEN:  # a check that breaks says nothing of the attempt
            folder.mark(lesson, exercise, outcome.passed)
        failing = folder.fails_now(lesson, exercise)
        show.outcome(exercise, outcome, show.once_solved(lesson, exercise, folder) if failing else "")
        if pictures:
            from shardrun.lesson.messages.shown import show_exercise

            show_exercise(lesson, exercise, attempt, outcome)
    folder.current = lesson.number
    folder.save()
    show.after_check(lesson, folder, course())
    return passed


def _watch(folder: Folder, lesson: Lesson, name: str | None) -> int:
    for _ in each_save(folder.attempt(lesson)):
        print("\033[2J\033[H" if show.is_terminal() else "", end="")
        if _check(folder, lesson, _exercises(lesson, name)):
            break
    return 0


def _solution(folder: Folder, lesson: Lesson, exercise: Exercise) -> None:
    print(function_source(lesson.folder / "solution.py", exercise.name))
    key = f"{lesson.name}/{exercise.name}"
    if folder.exists and key not in folder.solutions:
        folder.solutions.append(key)
        folder.save()
