"""The learner's folder: copies of the lessons, the accelerate configs, and progress.json.

Nothing in here is ever overwritten or deleted: what exists is left alone, and `reset` keeps what it replaces.
"""

import datetime
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from shardrun.lesson.course import Exercise, Lesson
from shardrun.output import write_whole
from strategies import strict_json
from strategies.errors import UserError

NAME = "learning"
PROGRESS = "progress.json"
SCHEMA = 1


@dataclass
class Folder:
    """A learner's folder and the progress in it."""

    path: Path
    current: int | None = None
    """Number of the lesson that was started or checked last."""
    solved: dict[str, list[str]] = field(default_factory=dict)
    """Lesson → its exercises that a check has passed: solved stays solved."""
    solved_on: dict[str, str] = field(default_factory=dict)
    """lesson/exercise → the day of the first check that passed, YYYY-MM-DD."""
    failing: list[str] = field(default_factory=list)
    """lesson/exercise of what was solved, and did not pass the last check."""
    hints: dict[str, int] = field(default_factory=dict)
    """lesson/exercise → hints shown."""
    solutions: list[str] = field(default_factory=list)
    """lesson/exercise of the solutions shown."""

    @property
    def exists(self) -> bool:
        return (self.path / PROGRESS).is_file()

    def lesson(self, lesson: Lesson) -> Path:
        return self.path / lesson.name

    def attempt(self, lesson: Lesson) -> Path:
        """The learner's exercise.py. Raises FileNotFoundError where the lesson has not been started."""
        path = self.lesson(lesson) / "exercise.py"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; begin with: shardrun lesson start {lesson.number}")
        return path

    def capstone(self, lesson: Lesson) -> Path:
        """The learner's strategy. Raises FileNotFoundError where it is not there."""
        assert lesson.capstone
        path = self.lesson(lesson) / lesson.capstone.file
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; begin with: shardrun lesson start {lesson.number}")
        return path

    def solved_in(self, lesson: Lesson) -> list[Exercise]:
        return [exercise for exercise in lesson.exercises if exercise.name in self.solved.get(lesson.name, [])]

    def levels_solved(self, lesson: Lesson) -> list[Exercise]:
        """Of its capstone."""
        levels = lesson.capstone.levels if lesson.capstone else ()
        return [level for level in levels if level.name in self.solved.get(lesson.name, [])]

    def fails_now(self, lesson: Lesson, exercise: Exercise) -> bool:
        """Whether it was solved once, and the last check of it did not pass."""
        return f"{lesson.name}/{exercise.name}" in self.failing

    def day_solved(self, lesson: Lesson, exercise: Exercise) -> str:
        """YYYY-MM-DD; empty where it is not solved, or was before days were noted."""
        return self.solved_on.get(f"{lesson.name}/{exercise.name}", "")

    def mark(self, lesson: Lesson, exercise: Exercise, passed: bool) -> None:
        """Note the outcome of a check. What was solved stays so; where it no longer passes, that is noted beside it."""
        names = self.solved.setdefault(lesson.name, [])
        key = f"{lesson.name}/{exercise.name}"
        if passed and exercise.name not in names:
            names.append(exercise.name)
            self.solved_on[key] = datetime.date.today().isoformat()
        if passed and key in self.failing:
            self.failing.remove(key)
        if not passed and exercise.name in names and key not in self.failing:
            self.failing.append(key)

    def next_hint(self, lesson: Lesson, exercise: Exercise) -> int:
        """How many hints the learner has seen, with the one that is due now; kept where the folder exists."""
        key = f"{lesson.name}/{exercise.name}"
        self.hints[key] = min(self.hints.get(key, 0) + 1, len(exercise.hints))
        if self.exists:
            self.save()
        return self.hints[key]

    def save(self) -> None:
        content = {key: value for key, value in vars(self).items() if key != "path"}
        text = strict_json.dumps({"schema": SCHEMA, **content}, indent=2) + "\n"
        write_whole(self.path / PROGRESS, text)  # never half a file


def open_folder(asked: Path | None = None) -> Folder:
    """The folder that was asked for; else the one that we are in; else `learning` here, whether it exists or not.

    Raises ValueError where its progress.json cannot be read.
    """
    path = asked
    if path is None:
        path = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / PROGRESS).is_file()), Path(NAME))
        if path == Path.cwd():
            path = Path(".")
    state = path / PROGRESS
    if not state.is_file():
        return Folder(path)
    try:
        content: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
        if content.pop("schema") != SCHEMA:
            raise UserError("another schema")
        return Folder(path, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{state} cannot be read ({error}); move it away to begin with no progress.") from error


def start(folder: Folder, lesson: Lesson) -> list[Path]:
    """Copy what the learner works with, and leave alone what is there. Returns the files that were made."""
    made = []
    for source in sorted(path for path in lesson.folder.iterdir() if path.is_file() and lesson.copies(path.name)):
        made += _copy(source, folder.lesson(lesson) / source.name)
    configs = Path(str(resources.files("accelerate_configs")))
    for source in sorted(configs.rglob("*.yaml")):
        _copy(source, folder.path / configs.name / source.relative_to(configs))
    folder.current = lesson.number
    folder.save()
    return made


def each_save(attempt: Path) -> Iterator[None]:
    """At once, where the file is there, and whenever it is saved; without end."""
    seen = 0.0
    while True:
        changed = attempt.stat().st_mtime if attempt.exists() else seen  # some editors replace a file when saving
        if changed != seen:
            seen = changed
            yield
            print(f"Waiting for {attempt} to be saved; Ctrl-C ends this.", flush=True)
        time.sleep(0.3)


def _copy(source: Path, target: Path) -> list[Path]:
    if target.exists():
        return []
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, source.read_bytes())  # half a file would be left alone from then on
    return [target]


def reset(folder: Folder, lesson: Lesson) -> Path:
    """Put the unsolved exercise.py back; the learner's becomes exercise.1.py, exercise.2.py … Returns that path."""
    attempt = folder.attempt(lesson)
    number = 1
    while (kept := attempt.with_name(f"exercise.{number}.py")).exists():
        number += 1
    attempt.rename(kept)
    _copy(lesson.folder / "exercise.py", attempt)
    folder.solved[lesson.name] = [level.name for level in folder.levels_solved(lesson)]  # the capstone stays
    again = {f"{lesson.name}/{exercise.name}" for exercise in lesson.exercises}
    folder.solved_on = {key: day for key, day in folder.solved_on.items() if key not in again}
    folder.failing = [key for key in folder.failing if key not in again]
    folder.save()
    return kept
