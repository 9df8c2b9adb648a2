"""The picture for a terminal: for each rank a line of what it computes and where it waits, and its messages below."""

from rich.text import Text

from shardrun.colours import ACCENT, REFERENCE, SENT
from shardrun.lesson.messages.moments import Flight, Moments, Row, lanes, squeezed
from shardrun.lesson.messages.words import is_open, labels

LANES = 6
"""Of messages that are under way at once, so many are drawn."""
WIDEST = 8
"""Characters of a column at most."""
STRIPS = 2
"""Where a picture does not fit it is cut into strips; so many before its columns get narrower."""
SHORT = {"forward": "fwd", "backward": "bwd", "update": "upd"}
"""Of phases."""
ROOMY = 5
"""Characters of a column in which something can be read."""
NAME = "rank 00  "


def fits(moments: Moments, room: int) -> bool:
    """Whether it needs no more than `room`, with room for words in its boxes."""
    return ROOMY * squeezed(moments).columns <= room - len(NAME)


def draw(moments: Moments, room: int) -> list[Text]:
    """Lines of at most `room` characters."""
    if not moments.columns:
        return []
    moments = squeezed(moments)
    cells = room - len(NAME)
    wide = next((w for w in range(WIDEST, 1, -1) if moments.columns * w <= cells), 0)
    wide = wide or next((w for w in range(4, 1, -1) if moments.columns * w <= STRIPS * cells), 1)
    each = cells // wide
    lines: list[Text] = []
    for first in range(0, moments.columns, each):
        if first:
            lines.append(Text("… and then:"))
        last = min(first + each, moments.columns)
        lines += _phases(moments, first, last, wide)
        for row in moments.rows:
            lines += _row(row, first, last, wide, moments.columns)
    return lines


def _phases(moments: Moments, first: int, last: int, wide: int) -> list[Text]:
    """Where the trainer's calls begin, on rank 0."""
    line = ""
    for column, phase in moments.rows[0].phases if moments.rows else ():
        name = SHORT.get(phase, phase)
        at = (column - first) * wide
        if first <= column < last and len(line) <= at and at + len(name) <= (last - first) * wide:
            line = f"{line:<{at}}{name} "
    return [Text(f"{'':<{len(NAME)}}{line.rstrip()}", "dim")] if line else []


def _row(row: Row, first: int, last: int, wide: int, columns: int) -> list[Text]:
    signs, style = [" "] * columns, {"█": ACCENT, "░": REFERENCE, " ": ""}
    for column in row.work:
        signs[column] = "█"
    for start, end in row.waits:
        signs[start : end + 1] = "░" * (end + 1 - start)
    head = Text(f"{f'rank {row.rank}':<{len(NAME)}}")
    for sign in signs[first:last]:
        head.append(sign * wide, style[sign])
    head.rstrip()
    lines, all_lanes = [head], lanes(row)
    for lane in all_lanes[:LANES]:
        line, at = Text(" " * len(NAME)), first
        for bar in lane:
            start, end = max(bar.first, first), min(bar.last, last - 1)
            if start > end:
                continue
            line.append(" " * ((start - at) * wide))
            line.append(box(bar, start, end, wide), f"bold {SENT}" if bar.exposed else SENT)
            at = end + 1
        if at > first:
            lines.append(line)
    if left := sum(len(lane) for lane in all_lanes[LANES:]) if first == 0 else 0:
        lines.append(Text(f"{'':<{len(NAME)}}(+{left} more at the same time)", "dim"))
    return lines


def box(bar: Flight, start: int, end: int, wide: int) -> str:
    """The part of a box from one column to another; cut ends are open."""
    width = (end - start + 1) * wide
    left = "[" if start == bar.first else "·"
    right = ("…" if is_open(bar.message) else "]") if end == bar.last else "·"
    if width < 2:
        return left
    mark = "!" if bar.exposed and width > 2 else ""
    inside = width - 2 - len(mark)
    label = next((text for text in labels(bar.message) if len(text) <= inside), "")
    return f"{left}{label:{'─' if inside > len(label) else ''}<{inside}}{mark}{right}"
