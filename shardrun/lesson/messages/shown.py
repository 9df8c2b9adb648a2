"""`shardrun lesson check N --show`: the picture of an exercise or of a capstone, printed and left as an SVG file."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from shardrun.lesson.course import Capstone, Exercise, Lesson
from shardrun.lesson.messages.moments import Moments, place
from shardrun.lesson.messages.read import Together, telling, together
from shardrun.lesson.messages.svg import document
from shardrun.lesson.messages.text import draw, fits
from shardrun.lesson.messages.words import ALL, EXPOSED, MOST, SIGNS, legend, safe, totals
from shardrun.output import write_whole
from shardrun.tables import fill, paragraph, table, width

if TYPE_CHECKING:
    from shardrun.lesson.judge import Outcome

RANKS = 2
"""Of the step of a capstone that is shown."""
INDENT = " " * 6
UNBROKEN = "\N{NO-BREAK SPACE}"
BETWEEN = 4
"""Columns between two pictures that stand beside each other."""


def show_exercise(lesson: Lesson, exercise: Exercise, attempt: Path, outcome: Outcome) -> None:
    """outcome: of a check with record=True, of an exercise on ranks."""
    from shardrun.lesson.judge import judge
    from shardrun.lesson.rank import UNREADABLE, UNSOLVED

    if exercise.ranks == 1:
        _sentence(f"{exercise.name} runs in one process: it sends nothing, so there is no picture of it.")
        return
    if outcome.status in (UNREADABLE, UNSOLVED):
        _sentence(f"{exercise.name} is not begun: it has sent nothing, so there is no picture of it yet.")
        return
    solution = judge(lesson, exercise, lesson.folder / "solution.py", record=True)
    ours, theirs = telling(together(outcome.recorded), together(solution.recorded))
    _show(exercise.name, attempt, ours, theirs, outcome)


def show_capstone(lesson: Lesson, capstone: Capstone, attempt: Path) -> None:
    """A step of the strategy, and of ours."""
    from shardrun.lesson.judge import record_step
    from shardrun.lesson.rank import UNREADABLE, UNSOLVED

    outcome = record_step(lesson, attempt, RANKS)
    if outcome.status in (UNREADABLE, UNSOLVED):
        _sentence(f"{capstone.name} does not train yet: it has sent nothing, so there is no picture of it.")
        return
    solution = record_step(lesson, lesson.folder / "by_hand.py", RANKS)
    ours, theirs = ((together(each.recorded) or [[]])[-1] for each in (outcome, solution))
    if not ours:
        why = next(iter(outcome.message.splitlines()), "")
        _sentence(f"{capstone.name} did not come to its first step, so there is no picture of it. {why}")
        return
    _show(capstone.name, attempt, ours, theirs, outcome)


def _show(name: str, attempt: Path, ours: Together, theirs: Together, outcome: Outcome) -> None:
    sides = [("Yours", ours), ("The solution's", theirs)]
    call = next((side[0] for side in (ours, theirs) if side), None)
    title = f"{name}: what {len(ours or theirs)} ranks send" + (f" ({safe(call.what, 100)})" if call else "")
    panels = [(head, place(side)) for head, side in sides]
    notes = [said] if (said := _ended(ours, outcome)) else []
    print()
    paragraph(title)
    for line in notes:
        paragraph(line)
    print()
    _print(panels)
    print()
    meanings = (f"{SIGNS.get(sign, '')} {words}".strip() for sign, words in legend([ours, theirs]))
    paragraph(", ".join(meaning.replace(" ", UNBROKEN) for meaning in meanings))
    print()
    counted = [totals(side) for side in (ours, theirs)]
    kinds = sorted(dict.fromkeys(kind for each in counted for kind in each), key=(ALL, MOST, EXPOSED).count)
    rows = [[kind, *(each.get(kind, "–") for each in counted)] for kind in kinds]
    if rows:
        table("", ["all ranks send", *(head.lower() for head, _ in sides)], rows)
    path = attempt.with_name(f"{name}.messages.svg")
    lines = [
        f"{head}: " + ("; ".join(f"{kind} {amount}" for kind, amount in each.items()) or "nothing is sent")
        for (head, _), each in zip(sides, counted, strict=True)
    ]
    write_whole(path, document(panels, title, [ours, theirs], [*notes, *lines]))
    print(f"Picture: {path}")


def _ended(ours: Together, outcome: Outcome) -> str:
    """Where the attempt did not come to its end, a sentence."""
    if not ours or all(call.done for call in ours):
        return ""
    ranks = ", ".join(str(rank) for rank, call in enumerate(ours) if not call.done)
    how = {"hung": "it waits for ever", "error": "it raised an error"}.get(outcome.status, "the check ended it")
    return f"On rank {ranks} this did not come to its end: {how}. What was sent until then is shown."


def _sentence(text: str) -> None:
    """As the outcome above it stands."""
    print(fill(text, INDENT, INDENT))


def _print(panels: list[tuple[str, Moments]]) -> None:
    """Beside each other where both fit, else below each other."""
    console = Console(highlight=False, soft_wrap=True)
    half = (width() - BETWEEN) // 2
    if all(fits(moments, half) for _, moments in panels):
        (head, ours), (other, theirs) = ((head, draw(moments, half)) for head, moments in panels)
        rows = zip_longest([Text(head, "bold"), *ours], [Text(other, "bold"), *theirs], fillvalue=Text(""))
        for left, right in rows:
            console.print(Text.assemble(left, " " * (half + BETWEEN - len(left)), right))
        return
    for i, (head, moments) in enumerate(panels):
        console.print(Text(f"\n{head}" if i else head, "bold"))
        for line in draw(moments, width()) or [Text("nothing is sent")]:
            console.print(line)
