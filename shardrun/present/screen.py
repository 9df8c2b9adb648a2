"""Frames on a terminal, one after another: the next on a key press or after some seconds; plain text elsewhere."""

import os
import select
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.rule import Rule
from rich.segment import Segment
from rich.text import Text

HEAD, FOOT = 2, 1
"""Lines of a frame above and below what it shows."""

PLAIN_WIDTH = 100

BACK, QUIT = {"b", "B", "\x1b[D", "\x1b[5~", "\x7f"}, {"q", "Q"}
"""b, ←, page up, backspace; q. Everything else, a presenter's page-down key too, brings the next frame."""


class Quit(Exception):
    """Whoever presents has seen enough."""


class Screen:
    """Where a presentation is shown; a context.

    auto: seconds that a frame stays, or None: until a key is pressed, or no time at all where stdin is no terminal. On
    a terminal the frames take the place of each other on its alternate screen. Where nobody paces them, or the output
    is no terminal, they are printed one below the other, without control characters in the latter case.
    """

    def __init__(self, title: str, auto: float | None = None, console: Console | None = None):
        self.title, self.auto = title, auto
        self.console = console or Console(highlight=False)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = PLAIN_WIDTH
        self.keys = Keys() if auto is None and self.console.is_terminal and sys.stdin.isatty() else None
        self.on_screen = self.console.is_terminal and (self.keys is not None or auto is not None)
        self._seen: list[tuple[str, RenderableType]] = []
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
        return max(10, (self.console.height if self.on_screen else 30) - HEAD - FOOT)

    def show(self, part: str, content: RenderableType) -> None:
        """The next frame, and wait. Raises Quit."""
        self._seen.append((part, content))
        if not self.on_screen:
            self._print(part, content)
            time.sleep(self.auto or 0)
            return
        at = len(self._seen) - 1
        while at < len(self._seen):
            self._draw(*self._seen[at])
            at = max(0, at - 1) if self._wait(*self._seen[at]) in BACK else at + 1

    def update(self, part: str, content: RenderableType) -> None:
        """Put a frame on the screen and go on; nothing where there is no screen. Raises Quit."""
        if self.on_screen:
            self._draw(part, content, "q: end")
            if self.keys and self.keys.pressed(0) in QUIT:
                raise Quit

    def say(self, text: str) -> None:
        """A line for those who see no screen."""
        if not self.on_screen:
            self.console.print(text, markup=False)

    def pages(self, markdown: str) -> list[Markdown]:
        """A text in as many frames as it takes, cut between its paragraphs and the entries of its lists."""
        pages: list[str] = []
        for block in _blocks(markdown):
            together = pages[-1] + block if pages else block
            if pages and self._lines(together) <= self.height:
                pages[-1] = together
            else:
                pages.append(block)
        return [_rendered(page) for page in pages]

    def _lines(self, markdown: str) -> int:
        return len(self.console.render_lines(_rendered(markdown), pad=False))

    def _wait(self, part: str, content: RenderableType) -> str:
        """The key that was pressed, or nothing when the seconds are over. A terminal that changes its size is drawn
        anew.
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
                self._draw(part, content)
        return ""

    def _draw(self, part: str, content: RenderableType, keys: str = "any key: next · b: back · q: end") -> None:
        """Head, what is shown, cut to what there is room for, and foot: as many lines as the screen has."""
        room = max(1, self.console.height - HEAD - FOOT)
        options = self.console.options.update(height=None)
        lines = self.console.render_lines(content, options)[:room]
        lines += [[]] * (room - len(lines))
        head = Text.assemble((self.title, "bold"), (f"  ·  {part}", "dim"), no_wrap=True, overflow="ellipsis")
        foot = Text(keys if self.keys else "", "dim", no_wrap=True, overflow="crop", justify="right")
        self._live.update(Group(head, Text(""), _Lines(lines), foot), refresh=True)

    def _print(self, part: str, content: RenderableType) -> None:
        self.console.print()
        self.console.print(Rule(f"{self.title} · {part}", align="left", style="none"))
        self.console.print()
        self.console.print(content)


class _Lines:
    """Lines that are rendered already."""

    def __init__(self, lines: list[list[Any]]):
        self.lines = lines

    def __rich_console__(self, console: Console, options: Any) -> Any:
        for line in self.lines:
            yield from line
            yield Segment.line()


def text(lines: Sequence[Text]) -> Group:
    """Lines of text, each cut to the width."""
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)


def _rendered(markdown: str) -> Markdown:
    return Markdown(markdown, code_theme="ansi_dark", hyperlinks=False)


def _blocks(markdown: str) -> list[str]:
    """The source of each paragraph, table, code block and list entry; one that ends with a colon includes the next."""
    from markdown_it import MarkdownIt

    lines = markdown.splitlines(keepends=True)
    starts = {0}
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        entry = token.type == "list_item_open" and token.level == 1
        if token.map and (token.level == 0 or entry):
            starts.add(token.map[0])
    blocks: list[str] = []
    ends = [*sorted(starts)[1:], len(lines)]
    for start, end in zip(sorted(starts), ends, strict=True):
        block = "".join(lines[start:end])
        if blocks and blocks[-1].rstrip().endswith(":"):
            blocks[-1] += block
        else:
            blocks.append(block)
    return blocks


class Keys:
    """Key presses, without waiting for the end of a line and without an echo; a context. Ctrl-C stays what it is."""

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
        """What was typed, an escape sequence as a whole, or nothing after so many seconds."""
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 32).decode(errors="replace") if ready else ""
