"""Places for the boxes and arrows of a diagram, in character cells: the same for a terminal and for a page.

A flowchart is cut into layers by the longest way to each box. Layers stand side by side, arrows run from the left to
the right between them. What does not fit beside each other goes on in a band below. An arrow that comes back runs below
the boxes. One that passes a layer has a row of its own there.
"""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from shardrun.present.diagram import Diagram, Flow, Gantt, Sequence
from shardrun.present.drawing import Box, Drawing, Path, Words
from shardrun.present.rows import gantt_drawing, sequence_drawing

GAP = 3
"""Columns between two layers at least: out of a box, the way up or down, the arrow's head."""
INLINE = 14
"""A label of so many columns at most stands on its arrow; longer ones have a number there and stand below."""
WRAPS = (30, 24, 20, 16, 14, 12, 10, 8)
"""Columns of a box's text that are tried."""
NUMBERS = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳"


def lay_out(diagram: Diagram, width: int, height: int = 1000) -> Drawing:
    """Within so many columns, as long as every word of the diagram fits them. height: rows that it should not exceed;
    boxes stand closer where it would.
    """
    if isinstance(diagram, Sequence):
        return sequence_drawing(diagram, width)
    if isinstance(diagram, Gantt):
        return gantt_drawing(diagram, width)
    best = _best(diagram, width, 1)
    return best if best.height <= height else min(best, _best(diagram, width, 0), key=lambda drawing: drawing.height)


def _best(flow: Flow, width: int, space: int) -> Drawing:
    tried = [_flow(flow, width, wrap, inline, space) for wrap in WRAPS for inline in (True, False)]
    fitting = [drawing for drawing in tried if drawing.width <= width] or [min(tried, key=lambda d: d.width)]
    return min(fitting, key=lambda drawing: (drawing.height + 3 * _legend(drawing), drawing.width))


def _legend(drawing: Drawing) -> int:
    return sum(word.quiet for word in drawing.words)


@dataclass
class _Node:
    """A box, or the place where a long arrow passes a layer (then it has no lines)."""

    name: str
    lines: list[str] = field(default_factory=list)
    titled: str = ""
    wide: int = 0
    high: int = 1
    x: int = 0
    y: int = 0
    named: int = 1
    into: "list[_Segment]" = field(default_factory=list)
    out: "list[_Segment]" = field(default_factory=list)

    @property
    def middle(self) -> int:
        return self.y + (self.high - 1) // 2


@dataclass
class _Segment:
    """A part of an arrow between two neighbouring layers. head, tail: where the arrow's heads are."""

    start: _Node
    end: _Node
    head: bool
    tail: bool
    label: str = ""
    leaves: int = 0
    arrives: int = 0


def _flow(flow: Flow, width: int, wrap: int, inline: bool, space: int) -> Drawing:
    layer_of, turned = _layers(flow)
    nodes = {name: _boxed(name, lines, flow.groups.get(name, ""), wrap) for name, lines in flow.boxes.items()}
    layers: list[list[_Node]] = [[] for _ in range(max(layer_of.values(), default=0) + 1)]
    for name, layer in layer_of.items():
        layers[layer].append(nodes[name])
    legend: list[str] = []
    returns: list[_Segment] = []
    for i, edge in enumerate(flow.edges):
        label = edge.label
        if label and not (inline and len(label) <= INLINE):
            if label not in legend:
                legend.append(label)
            label = NUMBERS[legend.index(label) % len(NUMBERS)]
        if i in turned or edge.start == edge.end:
            returns.append(_Segment(nodes[edge.start], nodes[edge.end], True, edge.both, label))
            continue
        chain = [nodes[edge.start]]
        for layer in range(layer_of[edge.start] + 1, layer_of[edge.end]):
            chain.append(_Node(""))
            layers[layer].append(chain[-1])
        chain.append(nodes[edge.end])
        for a, b in pairwise(chain):
            at_end = b is chain[-1]
            segment = _Segment(a, b, at_end, edge.both and a is chain[0], label if at_end else "")
            a.out.append(segment)
            b.into.append(segment)
    for node in nodes.values():
        back_out = sum(segment.tail for segment in node.out)
        ports = max(len(node.into), back_out + any(not segment.tail for segment in node.out))
        node.high = max(len(node.lines), ports) + 2
    lowest = {id(node) for segment in returns for node in (segment.start, segment.end)}
    _order(layers, lowest)
    drawing, y = Drawing(), 0
    crossing: list[_Crossing] = []
    bands = _bands(layers, width - len(returns))
    rows: dict[int, int] = {}  # band → the next free row below it
    band_of: dict[int, int] = {}
    aside = len(returns) if len(bands) > 1 else 0
    for number, (first, last) in enumerate(bands):
        band = layers[first:last]
        _heights(band, space)
        crossing = _draw_band(drawing, band, y + len(crossing), crossing, aside)
        band_of |= {id(node): number for layer in band for node in layer}
        rows[number] = drawing.height + 1  # a head stands above it
        touched = [s for s in returns if number in (band_of.get(id(s.start)), band_of.get(id(s.end)))]
        y = rows[number] + len(touched) if touched else drawing.height
    for lane, segment in enumerate(returns):
        _return(drawing, segment, lane, rows, band_of)
    y = drawing.height
    for i, label in enumerate(legend):
        lead = f"{NUMBERS[i % len(NUMBERS)]} "
        for j, line in enumerate(textwrap.wrap(label, max(10, width - 2))):
            drawing.words.append(Words(0, y, (lead if not j else "  ") + line, quiet=True))
            y += 1
    return drawing


def _boxed(name: str, lines: list[str], title: str, wrap: int) -> _Node:
    parts = [textwrap.wrap(line, wrap, break_long_words=False) or [""] for line in lines]
    if len(title) > max(wrap, 8):  # no room in the frame
        parts[0] = [*textwrap.wrap(f"{title}:", wrap, break_long_words=False), *parts[0]]
        title = ""
    wrapped = [line for part in parts for line in part]
    wide = max(max(map(len, wrapped)) + 2, len(title) + 4 if title else 0)
    return _Node(name, wrapped, title, wide + 2, named=len(parts[0]))


def _return(drawing: Drawing, segment: _Segment, lane: int, rows: dict[int, int], band_of: dict[int, int]) -> None:
    """An arrow that comes back: down out of its box, along below the boxes, and up to where it leads."""
    start, end = (node.x + node.wide // 2 for node in (segment.start, segment.end))
    below, above = band_of[id(segment.start)], band_of[id(segment.end)]
    row, target = rows[below], rows[above]
    rows[below] += 1
    points = [(start, segment.start.y + segment.start.high), (start, row)]
    if below == above:
        points += [(end, row), (end, segment.end.y + segment.end.high)]
    else:
        rows[above] += 1
        points += [(lane, row), (lane, target), (end, target), (end, segment.end.y + segment.end.high)]
    points = [point for i, point in enumerate(points) if not i or point != points[i - 1]]
    drawing.paths.append(Path(tuple(points), segment.tail, True))
    low, high = min(start, points[2][0]), max(start, points[2][0])
    if segment.label:
        drawing.words.append(Words((low + high - len(segment.label)) // 2 + 1, row, segment.label))


def _layers(flow: Flow) -> tuple[dict[str, int], set[int]]:
    """Box → its layer; and the numbers of those arrows that close a circle."""
    leaving: dict[str, list[tuple[int, str]]] = {name: [] for name in flow.boxes}
    for i, edge in enumerate(flow.edges):
        leaving[edge.start].append((i, edge.end))
    turned: set[int] = set()
    state: dict[str, int] = {}

    def visit(name: str) -> None:
        state[name] = 1
        for i, end in leaving[name]:
            if state.get(end) == 1:
                turned.add(i)
            elif end not in state:
                visit(end)
        state[name] = 2

    for name in flow.boxes:
        if name not in state:
            visit(name)
    forward = [edge for i, edge in enumerate(flow.edges) if i not in turned]
    layer = dict.fromkeys(flow.boxes, 0)
    for _ in flow.boxes:
        for edge in forward:
            layer[edge.end] = max(layer[edge.end], layer[edge.start] + 1)
    entered = {edge.end for edge in forward}
    for name in flow.boxes:  # what nothing leads to stands just before what it leads to
        ends = [layer[edge.end] for edge in forward if edge.start == name]
        if ends and name not in entered:
            layer[name] = min(ends) - 1
    return layer, turned


def _order(layers: list[list[_Node]], lowest: set[int]) -> None:
    """Neighbours beside each other: each layer by the mean place of those before it, then of those after it; those
    that arrows come back to or from stand lowest.
    """
    for sweep in range(4):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            place = {id(node): i for other in layers for i, node in enumerate(other)}

            def mean(node: _Node, place: dict[int, int] = place, forward: bool = sweep % 2 == 0) -> float:
                others = [s.start for s in node.into] if forward else [s.end for s in node.out]
                return sum(place[id(o)] for o in others) / len(others) if others else place[id(node)]

            layer.sort(key=mean)
    for layer in layers:
        layer.sort(key=lambda node: id(node) in lowest)


def _bands(layers: list[list[_Node]], width: int) -> list[tuple[int, int]]:
    """First and last (not included) layer of each band that fits the width, as even as they can be."""
    wide = [max((node.wide for node in layer), default=0) for layer in layers]
    gaps = [_gap(layer) for layer in layers]

    def fits(first: int, last: int, margin: int) -> bool:
        return sum(wide[first:last]) + sum(gaps[first : last - 1]) + margin <= width

    if fits(0, len(layers), 0):
        return [(0, len(layers))]
    for count in range(2, len(layers) + 1):
        size = -(-len(layers) // count)
        bands = [(i, min(i + size, len(layers))) for i in range(0, len(layers), size)]
        sides = [0, *(_margin([s for node in layers[last - 1] for s in node.out]) for _, last in bands)]
        if all(
            fits(first, last, sides[i] + (sides[i + 1] if last < len(layers) else 0))
            for i, (first, last) in enumerate(bands)
        ):
            return bands
    return [(i, i + 1) for i in range(len(layers))]


def _gap(layer: list[_Node]) -> int:
    segments = [segment for node in layer for segment in node.out]
    label = max((len(segment.label) + 2 for segment in segments if segment.label), default=0)
    return GAP + _ways(segments) + label


def _margin(segments: list[_Segment]) -> int:
    """Columns beside a band that these arrows take on their way into or out of it."""
    return len(segments) + 3 + max((len(segment.label) + 2 for segment in segments if segment.label), default=0)


def _ways(segments: Iterable[_Segment]) -> int:
    """Columns that ways up and down may take: one for each row of a box that arrows leave."""
    return len({(id(segment.start), segment.tail) for segment in segments})


def _heights(band: list[list[_Node]], space: int) -> None:
    """Rows: each box as near as can be to the mean of those that it is connected to. space: rows between boxes."""
    for layer in band:
        y = 0
        for node in layer:
            node.y = y
            y += node.high + 1
    inside = {id(node) for layer in band for node in layer}
    for sweep in range(7):
        forward = sweep % 2 == 0
        for layer in band if forward else reversed(band):
            wanted = []
            for node in layer:
                others = [s.start for s in node.into] if forward else [s.end for s in node.out]
                middles = sorted(other.middle for other in others if id(other) in inside)
                half = len(middles) // 2  # of an even number the mean of both in the middle: a median would drift
                middle = (middles[half] + middles[~half]) // 2 if middles else node.middle
                wanted.append(middle - (node.high - 1) // 2)
            _place(layer, wanted, space)
    top = min((node.y for layer in band for node in layer), default=0)
    for layer in band:
        for node in layer:
            node.y -= top


def _place(layer: list[_Node], wanted: list[int], space: int) -> None:
    """Least squares with the order kept: those that would overlap share the mean of what they want."""
    offsets, offset = [], 0
    for node in layer:
        offsets.append(offset)
        offset += node.high + (space if node.lines else 0)
    blocks: list[list[float]] = []  # mean, how many
    for want, offset in zip(wanted, offsets, strict=True):
        blocks.append([want - offset, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            mean, count = blocks.pop()
            blocks[-1] = [
                (blocks[-1][0] * blocks[-1][1] + mean * count) / (blocks[-1][1] + count),
                blocks[-1][1] + count,
            ]
    starts = [round(mean) for mean, count in blocks for _ in range(int(count))]
    for node, start, offset in zip(layer, starts, offsets, strict=True):
        node.y = start + offset


@dataclass(frozen=True)
class _Crossing:
    """An arrow that goes on in the band below: where it leaves its box, and a column that is free down from there."""

    segment: _Segment
    x: int
    free: int


def _draw_band(
    drawing: Drawing, band: list[list[_Node]], top: int, crossing: list[_Crossing], aside: int
) -> list[_Crossing]:
    """Boxes and arrows of some layers, from a row on, and what leaves the last of them. crossing: arrows from the band
    above, which come in along the rows above `top` and down the left margin. aside: columns to leave free on the left.
    """
    for node in (node for layer in band for node in layer):
        node.y += top
    for node in (node for layer in band for node in layer):
        _ports(node)
    left = aside + (_margin([came.segment for came in crossing]) if crossing else 0)
    x, columns = left, []
    for layer in band:
        wide = max((node.wide for node in layer), default=0)
        columns.append((x, x + wide))
        for node in layer:
            node.x, node.wide = x, wide
            if node.lines:
                box = Box(x, node.y, wide, node.high, tuple(node.lines), node.titled, node.named)
                drawing.boxes.append(box)
            else:
                drawing.paths.append(Path(((x, node.y), (x + wide, node.y)), at_end=False))
        x += wide + _gap(layer)
    for lane, came in enumerate(crossing):
        segment, row, down = came.segment, top - len(crossing) + lane, aside + lane
        points = [(came.x, segment.leaves), (came.free, segment.leaves), (came.free, row), (down, row)]
        points += [(down, segment.arrives), (left - bool(segment.end.lines), segment.arrives)]
        drawing.paths.append(Path(tuple(points), segment.tail, segment.head))
        _label(drawing, segment, left)
    for (_, right), (start, _), layer in zip(columns, columns[1:], band, strict=False):
        ways: dict[tuple[int, bool], int] = {}
        for segment in (segment for node in layer for segment in node.out):
            end = start - bool(segment.end.lines)
            points = [(right, segment.leaves)]
            if segment.leaves != segment.arrives:
                way = right + 1 + ways.setdefault((id(segment.start), segment.tail), len(ways))
                points += [(way, segment.leaves), (way, segment.arrives)]
            drawing.paths.append(Path((*points, (end, segment.arrives)), segment.tail, segment.head))
            _label(drawing, segment, start)
    last = [segment for node in band[-1] for segment in node.out]
    right = columns[-1][1]
    return [_Crossing(segment, right, right + 1 + len(last) - i) for i, segment in enumerate(last)]


def _ports(node: _Node) -> None:
    """The row of each arrow at its box: each that comes has its own, and so has each that is drawn from its end."""
    room = max(1, node.high - 2)
    first = node.y + 1 if node.lines else node.y
    into = sorted(node.into, key=lambda segment: segment.start.middle)
    for i, segment in enumerate(into):
        segment.arrives = first + (room - len(into)) // 2 + i if node.lines else node.y
    tails = [segment for segment in node.out if segment.tail]
    rows = len(tails) + (len(tails) < len(node.out))
    for segment in node.out:
        place = 1 + tails.index(segment) if segment.tail and len(tails) < len(node.out) else 0
        if segment.tail and len(tails) == len(node.out):
            place = tails.index(segment)
        segment.leaves = first + (room - rows) // 2 + place if node.lines else node.y


def _label(drawing: Drawing, segment: _Segment, x: int) -> None:
    """On the arrow, before its head at a box that begins in column x."""
    if segment.label:
        drawing.words.append(Words(x - 2 - len(segment.label), segment.arrives, segment.label))
