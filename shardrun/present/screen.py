"""Frames on a terminal, one after another: the next on a key press or after some seconds; plain text elsewhere.

What is higher or wider than the screen is scrolled, and the last line says how much more there is.
"""

import os
import re
import select
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.segment import Segment
from rich.text import Text
from rich.theme import Theme

from shardrun.colours import ACCENT
from shardrun.present.written import blocks, rendered

HEAD, FOOT = 2, 1
"""Lines of a frame above and below what it shows."""
PLAIN_WIDTH, PLAIN_HEIGHT = 100, 30
NOTE_LINES = 4
"""A speaker's note takes so many lines at most."""

BACK, QUIT = {"b", "B", "\x1b[D", "\x1b[5~", "\x7f"}, {"q", "Q"}
"""b, ←, page up, backspace; q. What has no meaning here, a presenter's page-down key too, brings the next frame."""
DOWN, UP = {"j", "\x1b[B"}, {"k", "\x1b[A"}
RIGHT, LEFT = {">", "l"}, {"<", "h"}
SKIP, NOTE, LIST, ESCAPE = {"s", "S"}, {"?"}, {"p", "P"}, {"\x1b"}

KEY = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO.|.", re.S)
"""A key press in what a terminal sends."""

THEME = Theme(
    {
        "markdown.code": f"bold {ACCENT}",
        "markdown.item.bullet": "bold",
        "markdown.item.number": "bold",
        "markdown.block_quote": "italic",
        "markdown.h1": "bold",
        "markdown.h2": "bold",
        "markdown.h3": "bold",
        "markdown.table.border": "dim",
        "markdown.table.header": "bold",
        "markdown.hr": "dim",
    }
)
"""Of all that is text: bold, dim and one colour of the palette (shardrun/colours.py)."""


class Quit(Exception):
    """Whoever presents has seen enough."""


@dataclass(frozen=True)
class Heading:
    """What a frame is: the part's name, its number of how many (from 0), and its page of how many."""

    name: str
    part: int = 0
    parts: int = 1
    page: int = 0
    pages: int = 1

    def __str__(self) -> str:
        page = f" ({self.page + 1} of {self.pages})" if self.pages > 1 else ""
        return f"part {self.part + 1} of {self.parts}: {self.name}{page}"


@dataclass(frozen=True)
class Wish:
    """What whoever presents wants: step +1 or -1 frame, a `part` (from 0), or to skip this one."""

    step: int = 1
    part: int | None = None
    skip: bool = False


class Lines:
    """Lines that keep their width: what does not fit beside each other is scrolled, not broken."""

    def __init__(self, lines: Sequence[Text]):
        self.lines = list(lines)

    def __rich_console__(self, console: Console, options: Any) -> Any:
        for line in self.lines:
            line.no_wrap, line.overflow = True, "ignore"
            yield line


class Screen:
    """Where a presentation is shown; a context.

    auto: seconds that a frame stays, or None: until a key is pressed, or no time at all where stdin is no terminal. On
    a terminal the frames take the place of each other on its alternate screen. Where nobody paces them, or the output
    is no terminal, they are printed one below the other, without control characters in the latter case.
    """

    def __init__(self, title: str, auto: float | None = None, console: Console | None = None):
        self.title, self.auto = title, auto
        self.console = console or Console(highlight=False)
        self.console.push_theme(THEME)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = PLAIN_WIDTH
        self.keys = Keys() if auto is None and self.console.is_terminal and sys.stdin.isatty() else None
        self.on_screen = self.console.is_terminal and (self.keys is not None or auto is not None)
        self.names: list[str] = []
        """Of all parts, for the list to jump by."""
        self.film: Callable[[list[list[Segment]], float], None] | None = None
        """Is given every frame that is drawn, as lines, and its time in seconds."""
        self._note = False
        self._open = ExitStack()

    def __enter__(self) -> "Screen":
        if self.keys:
            self._open.enter_context(self.keys)
        if self.on_screen:
            live = Live(console=self.console, screen=True, auto_refresh=False, vertical_overflow="crop")
            self._live = self._open.enter_context(live)
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.__exit__(None, None, None)

    @property
    def width(self) -> int:
        return self.console.width

    @property
    def height(self) -> int:
        """Lines that a frame can show between its head and its foot."""
        return max(10, (self.console.height if self.on_screen else PLAIN_HEIGHT) - HEAD - FOOT)

    def show(self, heading: Heading, content: RenderableType, note: str = "") -> Wish:
        """A frame, until there is a wish. Raises Quit."""
        if not self.on_screen:
            self.say_heading(heading)
            self.console.print(content, crop=False)
            time.sleep(self.auto or 0)
            return Wish()
        if not self.keys:
            for top, left in self._windows(content):
                self._draw(heading, content, "", top, left)
                self._wait(partial(self._draw, heading, content, "", top, left))
            return Wish()
        return self._paced(heading, content, note)

    def _paced(self, heading: Heading, content: RenderableType, note: str) -> Wish:
        top = left = 0
        while True:
            self._draw(heading, content, note, top, left)
            key = self._wait(partial(self._draw, heading, content, note, top, left))
            more_down, more_right = self._more(self._rendered(content), note, top, left)
            if key in DOWN:
                top += min(more_down, 3)
            elif key in UP:
                top = max(0, top - 3)
            elif key in RIGHT:
                left += min(more_right, self.width // 2)
            elif key in LEFT:
                left = max(0, left - self.width // 2)
            elif key in NOTE:
                self._note = not self._note
            elif key in LIST or key.isdecimal():
                if (part := self._ask_part(heading, key if key.isdecimal() else "")) is not None:
                    return Wish(part=part)
            elif key not in ESCAPE:
                return Wish(skip=True) if key in SKIP else Wish(step=-1 if key in BACK else 1)

    def update(self, heading: Heading, content: RenderableType, foot: str = "") -> Wish | None:
        """Put a frame on the screen and go on, with a wish where there was one; nothing where there is no screen.
        Raises Quit.
        """
        if not self.on_screen:
            return None
        self._draw(heading, content, "", foot=foot if self.keys else "")
        key = self.keys.pressed(0) if self.keys else ""
        if key in QUIT:
            raise Quit
        if key and (key in LIST or key.isdecimal()):
            part = self._ask_part(heading, key if key.isdecimal() else "")
            return None if part is None else Wish(part=part)
        return Wish(skip=True) if key in SKIP else Wish(step=-1) if key in BACK else None

    def ask(self, heading: Heading, content: Callable[[str], RenderableType]) -> str | Wish:
        """A line of text that is typed; content: with what has been typed so far. Nothing where nobody can type."""
        if not self.keys:
            return ""
        typed = ""
        while True:
            self._draw(heading, content(typed), "", foot="a number, then Enter; Enter alone: go on · p parts · q end")
            key = self._wait(lambda: None)
            if key in ("\r", "\n"):
                return typed
            if key in ("\x7f", "\b") and typed:
                typed = typed[:-1]
            elif key in LIST and not typed:
                if (part := self._ask_part(heading, "")) is not None:
                    return Wish(part=part)
            elif key in BACK or key in SKIP:
                return Wish(step=-1 if key in BACK else 1)
            elif all(letter.isprintable() for letter in key):
                typed += key

    def say_heading(self, heading: Heading) -> None:
        """The line above a frame, for those who see no screen."""
        if not self.on_screen:
            self.console.print()
            self.console.print(Rule(f"{self.title} · {heading}", align="left", style="none"))
            self.console.print()

    def say(self, text: str) -> None:
        """A line for those who see no screen."""
        if not self.on_screen:
            self.console.print(text, markup=False)

    def say_lines(self, lines: Iterable[Text]) -> None:
        """As they are, for those who see no screen."""
        if not self.on_screen:
            for line in lines:
                self.console.print(Lines([line]), crop=False)

    def pages(self, markdown: str) -> list[RenderableType]:
        """A text in as many frames as it takes, cut between its paragraphs and the entries of its lists."""
        pages: list[str] = []
        for block in blocks(markdown):
            together = pages[-1] + block if pages else block
            if pages and self._count(together) <= self.height:
                pages[-1] = together
            else:
                pages.append(block)
        return [rendered(page, self.width, self.height) for page in pages]

    def _count(self, markdown: str) -> int:
        return len(self._rendered(rendered(markdown, self.width, self.height)))

    def _rendered(self, content: RenderableType) -> list[list[Segment]]:
        options = self.console.options.update(height=None)
        if isinstance(content, Lines):  # as wide as they are
            options = options.update_width(max([self.width, *(line.cell_len for line in content.lines)]))
        return self.console.render_lines(content, options, pad=False)

    def _more(self, lines: list[list[Segment]], note: str, top: int, left: int) -> tuple[int, int]:
        """Lines below, and columns to the right of, what is seen from there."""
        wide = max((Segment.get_line_length(line) for line in lines), default=0)
        return max(0, len(lines) - top - self._room(note)), max(0, wide - left - self.width)

    def _windows(self, content: RenderableType) -> list[tuple[int, int]]:
        """Top and left of each screenful, where nobody can scroll: all that is there is seen, one after another."""
        down, right = self._more(self._rendered(content), "", 0, 0)
        tops = [*range(0, down, max(1, self._room("") - 2)), down] if down else [0]
        return [(top, left) for top in dict.fromkeys(tops) for left in ([0, right] if right else [0])]

    def _noted(self, note: str) -> list[str]:
        if not (self._note and note and self.on_screen):
            return []
        lines = textwrap.wrap(f"Note: {note}", self.width)
        return lines[:NOTE_LINES]

    def _room(self, note: str) -> int:
        return max(1, self.console.height - HEAD - FOOT - len(self._noted(note)))

    def _wait(self, draw_again: Callable[[], None]) -> str:
        """The key that was pressed, or nothing when the seconds are over. A terminal that changes its size is drawn
        anew. Raises Quit.
        """
        ending = time.monotonic() + self.auto if self.auto is not None else float("inf")
        size = self.console.size
        while (left := ending - time.monotonic()) > 0:
            if self.keys:
                key = self.keys.pressed(0.25)
                if key in QUIT:
                    raise Quit
                if key:
                    return key
            else:
                time.sleep(min(0.25, left))
            if size != self.console.size:
                size = self.console.size
                draw_again()
        return ""

    def _ask_part(self, heading: Heading, typed: str) -> int | None:
        """The list of all parts, and which one to go to; None for none of them."""
        while True:
            lines = [
                Text(f"{'▶' if i == heading.part else ' '} {i + 1:>2}  {name}", "bold" if i == heading.part else "")
                for i, name in enumerate(self.names)
            ]
            self._draw(heading, Lines(lines), "", foot=f"go to part {typed or '…'}   (number, Enter; Esc: stay)")
            key = self._wait(lambda: None)
            if key.isdecimal():
                typed += key
            elif key in ("\x7f", "\b"):
                typed = typed[:-1]
            elif key in ("\r", "\n") and typed:
                return int(typed) - 1 if 1 <= int(typed) <= len(self.names) else None
            else:
                return None

    def _draw(
        self, heading: Heading, content: RenderableType, note: str, top: int = 0, left: int = 0, foot: str = ""
    ) -> None:
        """Head, what is seen of the content from there, a note, and foot: as many lines as the screen has."""
        room, noted = self._room(note), self._noted(note)
        lines = self._rendered(content)
        down, right = self._more(lines, note, top, left)
        seen = [_columns(line, left, self.width) for line in lines[top : top + room]]
        seen += [[] for _ in range(room - len(seen))]
        seen += [[Segment(line)] for line in noted]
        head = Text.assemble((self.title, "bold"), (f"  ·  {heading}", "dim"), no_wrap=True, overflow="ellipsis")
        more = [f"↓ {down} line{'s' * (down > 1)} more: j"] if down else []
        more += [f"↑ {top} above: k"] if top else []
        more += [f"→ {right} columns more: >"] if right else []
        more += ["← <"] if left else []
        keys = foot or ("space next · b back · s skip · p parts · ? note · q end" if self.keys else "")
        told = Text(" · ".join(more) if self.keys else " · ".join(part.split(":")[0] for part in more), "bold")
        if told.cell_len + len(keys) + 2 > self.width:
            keys = "? note · q end" if self.keys and not foot else keys
        gap = " " * max(1, self.width - told.cell_len - len(keys))
        last = Text.assemble(told, gap, (keys, "dim"), no_wrap=True, overflow="crop")
        whole = Group(head, Text(""), _Segments(seen), last)
        if self.film:
            self.film(self.console.render_lines(whole, self.console.options.update(height=None)), time.monotonic())
        self._live.update(whole, refresh=True)


def _columns(line: list[Segment], left: int, width: int) -> list[Segment]:
    """What is seen of a line from a column on."""
    if left:
        line = list(Segment.divide(line, [left, left + width]))[1] if Segment.get_line_length(line) > left else []
    return Segment.adjust_line_length(line, width, pad=False)


class _Segments:
    """Lines that are rendered already."""

    def __init__(self, lines: list[list[Segment]]):
        self.lines = lines

    def __rich_console__(self, console: Console, options: Any) -> Any:
        for line in self.lines:
            yield from line
            yield Segment.line()


class Keys:
    """Key presses, without waiting for the end of a line and without an echo; a context. Ctrl-C stays what it is."""

    def __init__(self) -> None:
        self._read = ""

    def __enter__(self) -> "Keys":
        import termios
        import tty

        self._before = termios.tcgetattr(sys.stdin)
        tty.setcbreak(sys.stdin.fileno())
        return self

    def __exit__(self, *exception: object) -> None:
        import termios

        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def pressed(self, seconds: float) -> str:
        """A key that was typed, with its escape sequence where it has one, or nothing after so many seconds."""
        if not self._read:
            ready, _, _ = select.select([sys.stdin], [], [], seconds)
            self._read = os.read(sys.stdin.fileno(), 256).decode(errors="replace") if ready else ""
        found = KEY.match(self._read)
        key = found[0] if found else ""
        self._read = self._read[len(key) :]
        return key
