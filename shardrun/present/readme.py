"""A lesson's README.md, cut into what a presentation shows; nothing of it is written a second time."""

import re
from dataclasses import dataclass
from pathlib import Path

from shardrun.present.diagram import arrows
from strategies.errors import UserError

SECTIONS = ("Goal", "Mental model", "Terms", "What to look at")


@dataclass(frozen=True)
class Question:
    """A question of a lesson and its answer, in Markdown."""

    text: str
    answer: str


@dataclass(frozen=True)
class Readme:
    """The sections of a lesson that are presented, in Markdown; diagrams are lists of arrows."""

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
    goal, model, terms, look = (_with_arrows(sections[name]).strip() for name in SECTIONS)
    found = re.findall(r"<summary>(.*?)</summary>(.*?)</details>", sections["Questions"], re.S)
    questions = tuple(Question(" ".join(text.split()), _with_arrows(answer).strip()) for text, answer in found)
    return Readme(goal, model, terms, look, questions)


def _with_arrows(markdown: str) -> str:
    """A mermaid diagram needs a browser and a script; what it says is in its arrows."""

    def as_text(diagram: re.Match[str]) -> str:
        lines = arrows(diagram[1])
        return "```text\n" + "\n".join(lines) + "\n```" if lines else diagram[0]

    return re.sub(r"^```mermaid\n(.*?)^```", as_text, markdown, flags=re.M | re.S)
