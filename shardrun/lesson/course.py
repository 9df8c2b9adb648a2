"""The course: lesson folders, in the order of their numbers, each described by its lesson.toml."""

import re
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from strategies.errors import UserError

OURS = ("lesson.toml", "check.py", "solution.py", "wrong.py", "right.py", "mutants.toml", "target.py", "wrong.toml")
"""Files of a lesson that are not copied to the learner; nor are check_….py, the parts of a long check."""


def ours(name: str) -> bool:
    """Whether a file of a lesson is not copied to the learner."""
    return name in OURS or name.startswith("check_")


@dataclass(frozen=True)
class Exercise:
    """A function that the learner writes."""

    name: str
    about: str
    hints: tuple[str, ...]
    accounting: bool = False
    """A number to compute."""
    ranks: int = 1
    """Processes that it runs in; more than one are in a gloo group."""
    changes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The arguments that the function may change → how (ALLOWED in shardrun/lesson/arguments.py); none else."""


@dataclass(frozen=True)
class Capstone:
    """A whole strategy that the learner writes, in levels. Each is checked on 2 and on 3 ranks, one after the other."""

    file: str
    """The learner's file, for example my_ddp.py."""
    like: str
    """The strategy of the catalogue that it is like."""
    about: str
    levels: tuple[Exercise, ...]
    """Named after the functions of lessons/capstone/levels.py."""

    @property
    def name(self) -> str:
        return self.file.removesuffix(".py")


@dataclass(frozen=True)
class Live:
    """What `shardrun present` runs on ranks; the configs are shipped ones, for example cpu/zero2."""

    demo: str | None = None
    """The accelerate config that demo.py is launched with; None: one process, plain Python."""
    config: str | None = None
    """The one that a training run is launched with, to be watched; None: there is no such run."""
    arguments: tuple[str, ...] = ()
    """Of speedrun.train in that run."""


@dataclass(frozen=True)
class Guess:
    """The number that a demo asks for before it shows it."""

    question: str
    """With {ranks} where it depends on how many there are."""
    unit: str
    why: str
    """Where the number comes from, in a sentence."""
    ranks: int = 2
    """Of a demo that asks about ranks although it runs in one process."""


@dataclass(frozen=True)
class Lesson:
    """A lesson folder."""

    folder: Path
    title: str
    about: str
    minutes: int
    prerequisites: tuple[int, ...]
    exercises: tuple[Exercise, ...]
    live: Live = Live()
    guess: Guess | None = None
    notes: dict[str, str] = field(default_factory=dict)
    """Part of a presentation → what whoever speaks may say or point at there (shardrun/present/notes.py)."""
    capstone: Capstone | None = None

    def copies(self, name: str) -> bool:
        """Whether the learner gets this file. A capstone's solution comes when it is solved."""
        return not ours(name) and not (self.capstone and name == "by_hand.py")

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def number(self) -> int:
        return int(self.name.partition("_")[0])

    def exercise(self, name: str) -> Exercise:
        """Raises ValueError for a name that this lesson has not."""
        for exercise in self.exercises:
            if exercise.name == name:
                return exercise
        names = ", ".join(exercise.name for exercise in self.exercises)
        raise UserError(f"lesson {self.number} has no exercise {name!r}; it has {names}.")


def course(folder: Path | None = None) -> list[Lesson]:
    """All lessons of a folder, by default of the installed package. Raises ValueError for a bad lesson.toml."""
    folder = folder or Path(str(resources.files("lessons")))
    paths = [path for path in folder.iterdir() if re.match(r"\d\d_", path.name) and (path / "lesson.toml").is_file()]
    return [_read(path) for path in sorted(paths)]


def _read(folder: Path) -> Lesson:
    path = folder / "lesson.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        exercises = [_exercise(entry) for entry in content.pop("exercise")]
        content["prerequisites"] = tuple(content["prerequisites"])
        if "live" in content:
            arguments = tuple(content["live"].pop("arguments", ()))
            content["live"] = Live(arguments=arguments, **content["live"])
        if "guess" in content:
            content["guess"] = Guess(**content["guess"])
        if "capstone" in content:
            content["capstone"] = _capstone(content["capstone"])
        return Lesson(folder=folder, exercises=tuple(exercises), **content)
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no description of a lesson: {error}.") from error


def _exercise(entry: dict[str, Any]) -> Exercise:
    changes = {name: tuple(how) for name, how in entry.get("changes", {}).items()}
    return Exercise(**{**entry, "hints": tuple(entry["hints"]), "changes": changes})


def _capstone(entry: dict[str, Any]) -> Capstone:
    """Its levels are noted as NAME.LEVEL in progress.json."""
    levels = entry.pop("level")
    name = entry["file"].removesuffix(".py")
    return Capstone(
        **entry,
        levels=tuple(Exercise(f"{name}.{e['name']}", e["about"], tuple(e["hints"])) for e in levels),
    )


def find_lesson(number: int) -> Lesson:
    """Raises ValueError for a lesson there is not."""
    lessons = course()
    for lesson in lessons:
        if lesson.number == number:
            return lesson
    numbers = ", ".join(str(lesson.number) for lesson in lessons)
    raise UserError(f"there is no lesson {number}; there are {numbers}.")
