"""A diagram's drawing as text for a terminal and as SVG for a page. Both show the same boxes at the same places.

A box that is about something that the books have a category for has that category's colour, as the bars have.
"""

from html import escape

from rich.text import Text

from shardrun.colours import ACCENT, COLOURS, SENT
from shardrun.present.drawing import Box, Drawing, Path

UP, RIGHT, DOWN, LEFT = 1, 2, 4, 8
JOINED = " │─└││┌├─┘─┴┐┤┬┼"
"""The character of a cell by the directions in which lines leave it, added up."""
HEADS = {RIGHT: "▶", LEFT: "◀", DOWN: "▼", UP: "▲"}

ABOUT = {
    "activations": ("activation", "logits"),
    "gradients": ("gradient",),
    "master parameters": ("master",),
    "optimizer states": ("adamw", "optimizer", "momentum", "moments"),
    "communication buffers": ("bucket", "buffer"),
    "parameters": ("weight", "parameter"),
}
"""Category → what a box's text has in it that is about it; the first one counts."""

CELL, ROW = 8, 17
"""Units of a cell in an SVG."""
SCALE = 1.15
"""Pixels of a unit, where there is room for them."""


def category_of(box: Box) -> str:
    """The category that a box is about by its name, or nothing."""
    text = " ".join(box.lines[: box.name]).lower()
    return next((name for name, words in ABOUT.items() if any(word in text for word in words)), "")


def as_text(drawing: Drawing) -> list[Text]:
    """A line of text for each row."""
    width, height = drawing.width, drawing.height
    bits = [[0] * width for _ in range(height)]
    marks: dict[tuple[int, int], tuple[str, str]] = {}
    for path in drawing.paths:
        for (x1, y1), (x2, y2) in zip(path.points, path.points[1:], strict=False):
            _line(bits, x1, y1, x2, y2)
        for x, y, way in _heads(path):
            marks[x, y] = (HEADS[way], "")
    cells = [[(JOINED[bit], "dim") for bit in row] for row in bits]
    for (x, y), mark in marks.items():
        cells[y][x] = mark
    for box in drawing.boxes:
        colour = COLOURS.get(category_of(box), "")
        frame = colour or "dim"
        for x in range(box.x, box.x + box.width):
            for y in range(box.y, box.y + box.height):
                cells[y][x] = (" ", "")
        edge = "─" * (box.width - 2)
        title = f" {box.title} " if box.title else ""
        _write(cells, box.x, box.y, f"┌─{title}{edge[len(title) + 1 :]}┐" if title else f"┌{edge}┐", frame)
        _write(cells, box.x, box.y + box.height - 1, f"└{edge}┘", frame)
        for y in range(box.y + 1, box.y + box.height - 1):
            for x in (box.x, box.x + box.width - 1):
                cells[y][x] = ("│", frame)
        top = box.y + 1 + (box.height - 2 - len(box.lines)) // 2
        for i, line in enumerate(box.lines):
            _write(cells, box.x + 2, top + i, line, f"bold {colour}".strip() if i < box.name else "")
    for fill in drawing.fills:
        _write(cells, fill.x, fill.y, "█" * fill.width, SENT if fill.strong else ACCENT)
    for words in drawing.words:
        _write(cells, words.x, words.y, words.text, "")
    return [Text.assemble(*row) for row in cells]


def _write(cells: list[list[tuple[str, str]]], x: int, y: int, text: str, style: str) -> None:
    for i, letter in enumerate(text):
        if 0 <= x + i < len(cells[y]):
            cells[y][x + i] = (letter, style)


def _line(bits: list[list[int]], x1: int, y1: int, x2: int, y2: int) -> None:
    """Join the cells from one corner to the next."""
    across, down = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    ahead = RIGHT if across > 0 else LEFT if across < 0 else DOWN if down > 0 else UP
    back = {RIGHT: LEFT, LEFT: RIGHT, DOWN: UP, UP: DOWN}[ahead]
    while (x1, y1) != (x2, y2):
        if 0 <= y1 < len(bits) and 0 <= x1 < len(bits[y1]):
            bits[y1][x1] |= ahead
        x1, y1 = x1 + across, y1 + down
        if 0 <= y1 < len(bits) and 0 <= x1 < len(bits[y1]):
            bits[y1][x1] |= back


def _heads(path: Path) -> list[tuple[int, int, int]]:
    """Where there are heads, and which way they point."""
    found = []
    for wanted, points in ((path.at_end, path.points), (path.at_start, path.points[::-1])):
        if wanted:
            (x1, y1), (x2, y2) = points[-2:]
            way = RIGHT if x2 > x1 else LEFT if x2 < x1 else DOWN if y2 > y1 else UP
            found.append((x2, y2, way))
    return found


def as_svg(drawing: Drawing, label: str) -> str:
    """Inline SVG, at most as wide as its place; colours of lines and text are the page's own (page.css)."""
    wide, high = drawing.width * CELL, drawing.height * ROW
    size = f'viewBox="0 0 {wide} {high}" style="width:{wide * SCALE:.0f}px"'
    parts = [f'<svg class=diagram {size} role="img" aria-label="{escape(label)}">']
    for path in drawing.paths:
        points = " ".join(f"{_x(x)},{_y(y)}" for x, y in path.points)
        parts.append(f'<polyline class="{"way dashed" if path.dashed else "way"}" points="{points}"/>')
        parts += [_head(x, y, way) for x, y, way in _heads(path)]
    for box in drawing.boxes:
        x, y, w, h = box.x * CELL, box.y * ROW + ROW // 2, box.width * CELL, (box.height - 1) * ROW
        parts.append(f'<rect class=box x="{x}" y="{y}" width="{w}" height="{h}" rx="4"/>')
        if category := category_of(box):
            parts.append(f'<rect x="{x}" y="{y}" width="5" height="{h}" rx="2" fill="{COLOURS[category]}"/>')
        top = box.y + 1 + (box.height - 2 - len(box.lines)) // 2
        for i, line in enumerate(box.lines):
            kind = "name" if i < box.name else "more"
            parts.append(_text(x + w / 2, _y(top + i), line, kind, "middle", box.width - 2))
        if box.title:
            parts.append(_text(x + 2 * CELL, y, box.title, "title", "start", box.width - 3))
    for fill in drawing.fills:
        x, y = fill.x * CELL, fill.y * ROW + 2
        colour = SENT if fill.strong else ACCENT
        parts.append(f'<rect x="{x}" y="{y}" width="{fill.width * CELL}" height="{ROW - 4}" fill="{colour}"/>')
    for words in drawing.words:
        kind = "more" if words.quiet else "label"
        parts.append(_text(words.x * CELL, _y(words.y), words.text, kind, "start", len(words.text)))
    return "".join(parts) + "</svg>"


def _x(x: int) -> int:
    return x * CELL + CELL // 2


def _y(y: int) -> int:
    return y * ROW + ROW // 2


def _head(x: int, y: int, way: int) -> str:
    """A triangle whose tip is at the far side of the cell."""
    at, level, size = _x(x), _y(y), 4
    across = {RIGHT: 1, LEFT: -1}.get(way, 0)
    down = {DOWN: 1, UP: -1}.get(way, 0)
    tip = (at + across * size, level + down * size)
    back = (tip[0] - across * 8, tip[1] - down * 8)
    corners = [tip, (back[0] + down * size, back[1] + across * size), (back[0] - down * size, back[1] - across * size)]
    return f'<polygon class=head points="{" ".join(f"{a},{b}" for a, b in corners)}"/>'


def _text(x: float, y: int, text: str, kind: str, anchor: str, cells: int) -> str:
    """Text whose middle line is at y. It is squeezed where the reader's font is wider than its cells."""
    squeezed = f' textLength="{cells * CELL}" lengthAdjust="spacingAndGlyphs"' if len(text) > cells else ""
    return f'<text class={kind} x="{x:g}" y="{y + 4}" text-anchor="{anchor}"{squeezed}>{escape(text)}</text>'
