"""What a speaker may say at each part: the lesson's own sentence (lesson.toml, [notes]), then the general one."""

import re

from shardrun.lesson.course import Lesson

GENERAL = {
    "goal": "One minute. Ask who has met this already; come back to the goal at the end.",
    "model": "Draw along with the diagram: follow one gradient from the left to the right.",
    "terms": "Read only those that are new to the room. The learners have the list in README.md.",
    "guess": "Let everyone write a number down before you type one. A wrong guess teaches more than none.",
    "demo": "It has been running since you began. s ends it; what it has printed stays.",
    "look": "Go back to the output with b where somebody asks which number is meant.",
    "training": "Point at one bar and name its parts aloud. s ends the run early.",
    "step": "Ask where the peak is, and what has been sent by then.",
    "books": "Predicted came first, from shapes alone. Ask what a remainder would mean.",
    "question": "Hands up before the next key: it shows the answer.",
    "page": "Share the file: it needs no network and no Python.",
}
"""Part → a note that fits any lesson."""


def note_of(lesson: Lesson, part: str) -> str:
    """part: a key of GENERAL."""
    return " ".join(filter(None, (lesson.notes.get(part, ""), GENERAL[part])))


def plain(text: str) -> str:
    """Without the marks of Markdown."""
    return re.sub(r"[*`_]", "", text)
