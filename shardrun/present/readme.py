"""A lesson's README.md, cut into what a presentation shows; nothing of it is written a second time."""

import re
from dataclasses import dataclass
from pathlib import Path

from strategies.errors import UserError

SECTIONS = ("Goal", "Mental model", "Terms", "What to look at")


@dataclass(frozen=True)
class Question:
    """A question of a lesson and its answer, in Markdown."""

    text: str
    answer: str


@dataclass(frozen=True)
class Readme:
    """The sections of a lesson that are presented, in Markdown; diagrams are blocks of mermaid in it."""

    goal: str
    model: str
    terms: str
    look: str
    questions: tuple[Question, ...]


def read_readme(path: Path) -> Readme:
    """Raises ValueError where a section is missing, and FileNotFoundError where the file is."""
    # Not every ## is a heading: a fenced block may hold some. No lesson has any, and `lesson verify` reads them alike.
    parts = re.split(r"^## (.+)\n", path.read_text(encoding="utf-8"), flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name in (*SECTIONS, "Questions"):
        if name not in sections:
            raise UserError(f"{path} cannot be presented: it has no section {name!r}.")
    goal, model, terms, look = (sections[name].strip() for name in SECTIONS)
    found = re.findall(r"<summary>(.*?)</summary>(.*?)</details>", sections["Questions"], re.S)
    questions = tuple(Question(" ".join(text.split()), answer.strip()) for text, answer in found)
    return Readme(goal, model, terms, look, questions)


MERMAID = re.compile(r"^```mermaid\n(.*?)^```\n?", re.M | re.S)


def with_diagrams(markdown: str) -> list[tuple[str, str]]:
    """Cut into ("text", Markdown) and ("diagram", mermaid), in order; empty texts are left out."""
    parts = MERMAID.split(markdown)
    kinds = ("diagram" if i % 2 else "text" for i in range(len(parts)))
    return [(kind, part) for kind, part in zip(kinds, parts, strict=True) if part.strip()]
