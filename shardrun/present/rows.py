"""Places for sequences and Gantt charts, whose time runs down or to the right."""

import textwrap

from shardrun.present.diagram import Gantt, Sequence
from shardrun.present.drawing import Box, Drawing, Fill, Path, Words


def sequence_drawing(sequence: Sequence, width: int) -> Drawing:
    """A line down for each who takes part; what one does by itself is a box on its line."""
    drawing, count = Drawing(), len(sequence.names)
    apart = min(46, width // max(1, count))
    middle = {name: apart // 2 + i * apart for i, name in enumerate(sequence.names)}
    free = dict.fromkeys(sequence.names, 3)

    def box(name: str, text: str, y: int) -> int:
        lines = textwrap.wrap(text, apart - 6)
        wide = max(map(len, lines)) + 4
        drawing.boxes.append(Box(middle[name] - wide // 2, y, wide, len(lines) + 2, tuple(lines)))
        return y + len(lines) + 2

    for name in sequence.names:
        box(name, name, 0)
    for message in sequence.messages:
        if message.start and message.start == message.end:
            free[message.start] = box(message.start, message.text, free[message.start])
            continue
        y = max(free.values())
        whole = (min(middle.values()), max(middle.values()))
        start, end = (middle[message.start], middle[message.end]) if message.start else whole
        low, high = min(start, end), max(start, end)
        lines = textwrap.wrap(message.text, max(8, high - low - 4))
        if message.start:
            for i, line in enumerate(lines):
                drawing.words.append(Words((low + high - len(line)) // 2 + 1, y + i, line))
            y += len(lines)
            step = 1 if end > start else -1
            drawing.paths.append(Path(((start + step, y), (end - step, y))))
        else:
            lines = textwrap.wrap(message.text, max(8, count * apart - 6))
            for i, line in enumerate(lines):
                drawing.words.append(Words((low + high - len(line)) // 2, y + i, f" {line} "))
            y += len(lines) - 1
            drawing.paths.append(Path(((low - 4, y), (high + 4, y)), at_end=False, dashed=True))
        free = dict.fromkeys(free, y + 1)
    lowest = max(free.values())
    lives = [Path(((x, 3), (x, lowest - 1)), at_end=False, dashed=True) for x in middle.values()]
    drawing.paths[:0] = lives
    return drawing


def gantt_drawing(chart: Gantt, width: int) -> Drawing:
    """A row for each bar; where there is little room its name has a row of its own."""
    drawing = Drawing()
    sections = max(len(task.section) for task in chart.tasks) + 2
    names = max(len(task.name) for task in chart.tasks) + 2
    narrow = width - sections - names < 30
    left = sections if narrow else sections + names
    scale = (width - left) / max(task.end for task in chart.tasks)
    y = 0
    for line in textwrap.wrap(chart.title, width):
        drawing.words.append(Words(0, y, line))
        y += 1
    section = ""
    for task in chart.tasks:
        if task.section != section:
            section = task.section
            drawing.words.append(Words(0, y, section))
        start, end = round(task.start * scale), max(round(task.start * scale) + 1, round(task.end * scale))
        drawing.words.append(Words(sections, y, task.name, quiet=narrow))
        y += narrow
        drawing.fills.append(Fill(left + start, y, end - start, task.critical))
        y += 1
    return drawing
