"""The frames of a presentation as one animated SVG, for a README: text that stays text, no script, nothing loaded."""

import io
import re
from html import escape
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.segment import Segment
from rich.style import Style

from shardrun.output import write_whole

WIDTH, HEIGHT = 100, 30
"""Of the terminal that is filmed."""
CELL, ROW, EDGE = 8.4, 18, 12
"""Pixels of a cell, and around all."""
INK, PAPER = "#e8eaed", "#15181c"
"""As shardrun/present/page.css in the dark."""
SHORTEST = 0.5
"""Seconds: of frames that follow each other more quickly only the last is kept."""
PAUSE = 3.0
"""Seconds that the last frame stays before it begins again."""
MOST = 60
"""Frames."""


class Film:
    """Is called with every frame, as rendered lines and a time in seconds, and written at the end."""

    def __init__(self, path: Path, command: str):
        self.path, self.command = path, command
        self._frames: list[tuple[float, list[str]]] = []
        self._end = 0.0

    @staticmethod
    def terminal() -> Console:
        """Where a presentation is drawn that nobody watches."""
        return Console(
            file=io.StringIO(),
            force_terminal=True,
            color_system="truecolor",
            width=WIDTH,
            height=HEIGHT,
            highlight=False,
        )

    def __call__(self, lines: list[list[Segment]], at: float) -> None:
        frame = [_line(line) for line in lines]
        self._end = at
        if self._frames and self._frames[-1][1] == frame:
            return
        if self._frames and at - self._frames[-1][0] < SHORTEST and len(self._frames) > 1:
            self._frames[-1] = (self._frames[-1][0], frame)
        else:
            self._frames.append((at, frame))

    def write(self, title: str) -> Path:
        """Write the SVG. A line that is in several frames is in it once."""
        frames = list(self._frames)
        while len(frames) > MOST:  # the one that is seen for the shortest time is missed least
            stays = [after - at for (at, _), (after, _) in pairwise(frames)]
            frames.pop(stays.index(min(stays)))
        start = frames[0][0]
        end = self._end + PAUSE
        ids: dict[str, int] = {}
        shown = []
        high = HEIGHT * ROW + 2 * EDGE
        for i, (_, lines) in enumerate(frames):
            for row, line in enumerate(lines):
                if line:
                    number = ids.setdefault(line, len(ids))
                    shown.append(f'<use href="#l{number}" y="{i * high + EDGE + row * ROW}"/>')
        keys = "".join(
            f"{(at - start) / (end - start):.4%}{{transform:translateY({-i * high}px)}}"
            for i, (at, _) in enumerate(frames)
        )
        wide = WIDTH * CELL + 2 * EDGE
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {high}" role="img">',
            f"<title>{escape(title)}</title><desc>Made by: {escape(self.command)}</desc>",
            f"<style>text{{font:14px ui-monospace,Menlo,Consolas,monospace;fill:{INK};white-space:pre}}"
            f".b{{font-weight:bold}}.d{{opacity:.65}}@keyframes f{{{keys}100%{{transform:translateY("
            f"{-(len(frames) - 1) * high}px)}}}}"
            f"#f{{animation:f {end - start:.1f}s step-end infinite}}"
            "@media(prefers-reduced-motion:reduce){#f{animation:none}}</style>",
            "<defs>",
            *(f'<g id="l{number}">{line}</g>' for line, number in ids.items()),
            f'</defs><rect width="{wide:g}" height="{high}" rx="8" fill="{PAPER}"/><g id="f">',
            *shown,
            "</g></svg>\n",
        ]
        write_whole(self.path, "".join(parts))
        return self.path


def _line(line: list[Segment]) -> str:
    """A line's text in its colours, and bars behind it; nothing for an empty one."""
    parts, column = [], 0
    for segment in line:
        if segment.control or segment.text == "\n":
            continue
        text, style = segment.text.rstrip("\n"), segment.style or Style()
        if style.bgcolor and not style.bgcolor.is_default:
            fill = style.bgcolor.get_truecolor().hex
            parts.append(
                f'<rect x="{EDGE + column * CELL:.1f}" width="{len(text) * CELL:.1f}" height="{ROW}" fill="{fill}"/>'
            )
        for found in re.finditer(r"\S+(?: \S+)*", text):
            parts.append(_words(found[0], column + found.start(), style))
        column += segment.cell_length
    return "".join(parts)


def _words(words: str, column: int, style: Style) -> str:
    """Text that takes its columns in any font."""
    kind = " ".join(name for name, on in (("b", style.bold), ("d", style.dim)) if on)
    marks = f' class="{kind}"' if kind else ""
    if style.color and not style.color.is_default:
        marks += f' fill="{style.color.get_truecolor().hex}" style="fill:{style.color.get_truecolor().hex}"'
    return (
        f'<text x="{EDGE + column * CELL:.1f}" y="14" textLength="{len(words) * CELL:.1f}"{marks}>'
        f"{escape(words)}</text>"
    )
