"""The classic wrong versions of a capstone: its solution, by_hand.py, with passages replaced (wrong.toml)."""

import tomllib
from dataclasses import dataclass

from shardrun.lesson.course import Exercise, Lesson


@dataclass(frozen=True)
class Version:
    """A wrong version; the level must refuse it, with words that contain `says`."""

    name: str
    level: Exercise
    says: str
    text: str
    """The whole file."""


def wrong_versions(lesson: Lesson) -> list[Version]:
    """Raises AssertionError (ours) where a passage to be replaced is not there exactly once."""
    assert lesson.capstone
    solution = (lesson.folder / "by_hand.py").read_text(encoding="utf-8")
    levels = {level.name.partition(".")[2]: level for level in lesson.capstone.levels}
    found = []
    for entry in tomllib.loads((lesson.folder / "wrong.toml").read_text(encoding="utf-8"))["wrong"]:
        text = solution
        for change in (entry, *entry.get("also", ())):
            old, new = change["old"], change["new"]
            assert text.count(old) == 1, f"{entry['name']}: {old!r} stands {text.count(old)} times in by_hand.py"
            text = text.replace(old, new)
        found.append(Version(entry["name"], levels[entry["level"]], entry["says"], text))
    return found
