"""Tables and paragraphs for the terminal, as wide as it is: no word and no number is ever cut."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence

WIDEST = 100
"""Columns at most, and where there is no terminal to ask."""
NARROWEST = 40
ROOM = 18
"""Columns that a table's last one needs at least, where it is text."""


def width() -> int:
    """Columns of the terminal, or of COLUMNS."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


def fill(text: str, first: str = "", later: str = "", room: int = 0) -> str:
    """Text in lines that begin with `first` and `later`, within `room` columns, or the terminal's. Words stay whole: a
    path, a key or a number can be copied.
    """
    return textwrap.fill(
        text,
        room or width(),
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    text: bool = False,
    left: int = 1,
    colours: Mapping[str, str] | None = None,
) -> None:
    """Print a table: `left` columns of words on the left, the others on the right. What does not fit beside the first
    of them follows in a table below it.

    text: the last column is text, which is wrapped at its words. colours: of a cell or heading, by what it says.
    """
    if title:
        print(fill(title))
    sizes = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    if text:
        sizes[-1] = 0
    columns = list(range(1, len(headings)))
    while columns:
        gap = 2 if _needed(sizes, [0, *columns], 2) + (ROOM if text else 0) <= width() else 1
        fitting = [0, columns.pop(0)]
        reserved = ROOM if text else 0
        while columns and _needed(sizes, [*fitting, columns[0]], gap) + reserved <= width():
            fitting.append(columns.pop(0))
        _print(headings, rows, sizes, fitting, gap, text and len(headings) - 1 in fitting, left, colours or {})
    print()


def _needed(sizes: Sequence[int], columns: Sequence[int], gap: int) -> int:
    return sum(sizes[column] for column in columns) + gap * (len(columns) - 1)


def _print(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    sizes: Sequence[int],
    columns: Sequence[int],
    gap: int,
    text: bool,
    words: int,
    colours: Mapping[str, str],
) -> None:
    """These columns; with `text` the last of them in what is left of the line."""
    numbers = columns[:-1] if text else columns
    taken = _needed(sizes, numbers, gap)
    left = max(ROOM, width() - taken - gap) if text else 0

    def cells(row: Sequence[str]) -> str:
        placed = (row[c].ljust(sizes[c]) if c < words else row[c].rjust(sizes[c]) for c in numbers)
        line = (" " * gap).join(placed)
        if text:
            line += " " * gap + f"\n{' ' * (taken + gap)}".join(fill(row[columns[-1]], room=left).splitlines() or [""])
        return line.rstrip()

    lines = [cells(headings), *map(cells, rows)]
    rule = "─" * max(len(part) for line in lines for part in line.splitlines() or [""])
    for line in [lines[0], rule, *lines[1:]]:
        _coloured(line, colours)


def _coloured(line: str, colours: Mapping[str, str]) -> None:
    """Print a line, what has a colour in it where the terminal shows colours."""
    if not colours:
        print(line)
        return
    from rich.console import Console
    from rich.text import Text

    shown = Text(line)
    for what, colour in colours.items():
        shown.highlight_words([what], colour)
    Console(highlight=False, soft_wrap=True).print(shown)


def wrapped(label: str, text: str) -> None:
    """A paragraph behind a label."""
    start = f"  {label} " if label else "  "
    indent = " " * len(start) if len(start) <= width() // 3 else "    "
    print(fill(text, start, indent))


def paragraph(text: str) -> None:
    """A sentence or more, from the left edge on."""
    print(fill(text))


def mib(amount: float, digits: int = 2) -> str:
    """Bytes as MiB, a dash for none."""
    return f"{amount / 2**20:,.{digits}f}" if amount else "–"


def gib(amount: float) -> str:
    """Bytes as GiB, a dash for none."""
    return f"{amount / 2**30:,.2f}" if amount else "–"
