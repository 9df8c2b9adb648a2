"""The same picture as an SVG file of its own. Each box tells the rest where the pointer rests on it."""

from html import escape

from shardrun.colours import ACCENT, REFERENCE, SENT
from shardrun.lesson.messages.moments import Flight, Moments, Row, lanes
from shardrun.lesson.messages.read import Together
from shardrun.lesson.messages.words import is_open, labels, legend, safe

WIDE, LEAST, MOST = 1000, 10, 60
"""Pixels of all columns of a panel that has many; of a column."""
WIDEST = 1200
"""Of panels that stand beside each other."""
LETTER = 6.6
"""Of a letter of 11 px, on average."""
LOOKS = {
    "computes": f'fill="{ACCENT}"',
    "waits": f'fill="{REFERENCE}" fill-opacity="0.55"',
    "travels": f'fill="{SENT}" fill-opacity="0.18" stroke="{SENT}"',
    "exposed": f'fill="{SENT}" fill-opacity="0.75" stroke="{SENT}"',
    "open": f'fill="{SENT}" fill-opacity="0.05" stroke="{SENT}" stroke-dasharray="4 3"',
}
ENDS = {"exposed": "nothing is computed meanwhile", "open": "not waited for, or not over", "travels": ""}
NAME, LANE, WORK = 60, 22, 16
GAP, MARGIN = 40, 16


def document(panels: list[tuple[str, Moments]], title: str, sides: list[Together], notes: list[str]) -> str:
    """The panels, on one scale of time, beside each other where they are narrow, else below each other. sides: whose
    signs are explained."""
    unit = min(MOST, max(LEAST, WIDE / max(1, *(moments.columns for _, moments in panels))))
    drawn = [_panel(head, moments, unit) for head, moments in panels]
    beside = sum(width + GAP for _, width, _ in drawn) <= WIDEST
    parts: list[str] = []
    x, y, wide, high = float(MARGIN), 2 * MARGIN + 14.0, 0.0, 0.0
    for content, width, height in drawn:
        parts.append(f'<g transform="translate({x:g} {y:g})">{content}</g>')
        wide, high = max(wide, x + width), max(high, y + height)
        x, y = (x + width + GAP, y) if beside else (x, y + height + GAP)
    texts = [f'<text x="{MARGIN}" y="{MARGIN + 8}" font-weight="bold">{_words(title)}</text>']
    explained, end = _legend(sides, high + 8)
    wide, high = max(wide, end), high + 24
    for line in notes:
        high += 18
        texts.append(f'<text x="{MARGIN}" y="{high + MARGIN:g}">{_words(line)}</text>')
        wide = max(wide, MARGIN + LETTER * len(line))
    wide, high = max(wide, MARGIN + 8 * len(title)) + MARGIN, high + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:.0f}" height="{high:.0f}" '
        f'viewBox="0 0 {wide:.0f} {high:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="black" '
        f'role="img" aria-label="{_words(title)}"><rect width="100%" height="100%" fill="white"/>'
        + "".join([*texts, *parts, explained])
        + "</svg>\n"
    )


def _legend(sides: list[Together], y: float) -> tuple[str, float]:
    """A line of samples and what they mean, and where it ends."""
    parts, x = [], float(MARGIN)
    for look, words in legend(sides):
        if look:
            parts.append(f'<rect x="{x:g}" y="{y:g}" width="16" height="12" rx="2" {LOOKS[look]}/>')
            x += 22
        parts.append(f'<text x="{x:g}" y="{y + 11:g}">{_words(words)}</text>')
        x += LETTER * len(words) + 18
    return "".join(parts), x


def _words(text: str) -> str:
    return escape(safe(text, 1000))


def _panel(head: str, moments: Moments, unit: float) -> tuple[str, float, float]:
    """Its content, width and height."""
    width = max(NAME + unit * moments.columns, LETTER * len(head))
    parts, y = [f'<text y="0" font-weight="bold">{_words(head)}</text>'], 14.0
    phases = moments.rows[0].phases if moments.rows else []
    free = 0.0
    for column, name in phases:
        x = NAME + column * unit
        if x >= free:
            parts.append(f'<text x="{x:g}" y="{y + 8:g}" font-size="10" fill-opacity="0.6">{_words(name)}</text>')
            free = x + LETTER * len(name) + 4
    y += 16 if phases else 0
    top = y
    for row in moments.rows:
        content, height = _row(row, y, unit)
        parts.append(content)
        y += height + 12
    for column, _ in phases:
        x = NAME + column * unit
        parts.append(f'<line x1="{x:g}" x2="{x:g}" y1="{top:g}" y2="{y:g}" stroke="{REFERENCE}" stroke-opacity="0.5"/>')
    if not moments.rows or not any(row.bars for row in moments.rows):
        parts.append(f'<text x="{NAME}" y="{y + 8:g}" fill-opacity="0.6">nothing is sent</text>')
        y += 20
    return "".join(parts), width, y


def _row(row: Row, y: float, unit: float) -> tuple[str, float]:
    parts = [f'<text y="{y + WORK - 4:g}">rank {row.rank}</text>']
    for column, what in row.work.items():
        parts.append(_rect(NAME + column * unit, y, unit, WORK - 4, LOOKS["computes"], what))
    for first, last in row.waits:
        parts.append(_rect(NAME + first * unit, y, (last - first + 1) * unit, WORK - 4, LOOKS["waits"], "waits"))
    every = lanes(row)
    for i, lane in enumerate(every):
        parts += [_bar(bar, y + WORK + i * LANE, unit) for bar in lane]
    return "".join(parts), WORK + LANE * len(every)


def _rect(x: float, y: float, width: float, height: float, look: str, tip: str) -> str:
    inner = f"<title>{_words(tip)}</title>"
    return f'<rect x="{x + 0.5:g}" y="{y:g}" width="{width - 1:g}" height="{height:g}" rx="2" {look}>{inner}</rect>'


def _bar(bar: Flight, y: float, unit: float) -> str:
    message, width = bar.message, (bar.last - bar.first + 1) * unit
    kind = "exposed" if bar.exposed else "open" if is_open(message) else "travels"
    tip = ", ".join(filter(None, (labels(message)[0], message.phase, ENDS[kind])))
    x = NAME + bar.first * unit
    label = next((text for text in labels(message) if LETTER * len(text) + 6 <= width), "")
    text = f'<text x="{x + 5:g}" y="{y + 13:g}" font-size="11" pointer-events="none">{_words(label)}</text>'
    return _rect(x, y, width, LANE - 4, LOOKS[kind], tip) + (text if label else "")
