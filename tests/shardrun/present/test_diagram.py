"""Mermaid diagrams, read; boxes and arrows, laid out in any width and drawn."""

import re
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardrun.present.diagram import Edge, Flow, Gantt, Message, Sequence, Task, read_diagram
from shardrun.present.drawing import Box, Drawing
from shardrun.present.drawn import as_svg, as_text
from shardrun.present.layout import NUMBERS, lay_out

LESSONS = Path(__file__).parents[3] / "lessons"
SOURCES = [
    pytest.param(source, id=f"{path.parent.name}-{i}")
    for path in sorted(LESSONS.glob("*/README.md"))
    for i, source in enumerate(re.findall(r"^```mermaid\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]


def shown(drawing: Drawing) -> str:
    return "\n".join(line.plain.rstrip() for line in as_text(drawing))


@pytest.mark.parametrize(
    ("source", "boxes", "edges"),
    [
        ("flowchart LR\n A[one] --> B(two)", {"A": ["one"], "B": ["two"]}, [Edge("A", "B")]),
        ('flowchart TD\n A["a [x]<br/>below"] -->|says| B\n A -- says --> C{why?}',
         {"A": ["a [x]", "below"], "B": ["B"], "C": ["why?"]}, [Edge("A", "B", "says"), Edge("A", "C", "says")]),
        ("graph LR\n A --> B --> C\n A & B -.-> D([end])", {"A": ["A"], "B": ["B"], "C": ["C"], "D": ["end"]},
         [Edge("A", "B"), Edge("B", "C"), Edge("A", "D"), Edge("B", "D")]),
        ("flowchart LR\n A[all of<br/>it] <--> B\n %% nothing\n classDef x fill:#fff",
         {"A": ["all of", "it"], "B": ["B"]}, [Edge("A", "B", both=True)]),
    ],
)  # fmt: skip
def test_flowcharts_are_read(source: str, boxes: dict[str, list[str]], edges: list[Edge]) -> None:
    flow = read_diagram(source)
    assert isinstance(flow, Flow) and flow.boxes == boxes and flow.edges == edges


def test_groups_sequences_and_charts_are_read() -> None:
    flow = read_diagram("flowchart LR\n subgraph r0 [rank 0]\n a[w] --> b\n end\n subgraph rank 1\n c\n end\n b ==> c")
    assert isinstance(flow, Flow) and flow.groups == {"a": "rank 0", "b": "rank 0", "c": "rank 1"}
    sequence = read_diagram(
        "sequenceDiagram\n participant A as rank 0\n Note over A,B: equal\n A->>B: x\n B-->>B: adds"
    )
    expected = [Message("", "", "equal"), Message("rank 0", "B", "x"), Message("B", "B", "adds")]
    assert sequence == Sequence(["rank 0", "B"], expected)
    chart = read_diagram("gantt\n title t\n section GPU\n work :a, 0, 10s\n wait :crit, b, after a, 20s")
    assert chart == Gantt("t", [Task("GPU", "work", 0, 10), Task("GPU", "wait", 10, 30, critical=True)])


@pytest.mark.parametrize(
    "source",
    ["gantt\n work :a, 2026-01-01, 3d", "pie\n nothing", "flowchart LR\n A --> B\n what is this", "",
     "sequenceDiagram\n what is this"],
)  # fmt: skip
def test_what_is_not_understood_is_none(source: str) -> None:
    assert read_diagram(source) is None


def holds(drawing: Drawing, width: int) -> None:
    """What every drawing promises."""
    assert drawing.width <= width
    for one, other in combinations(drawing.boxes, 2):
        apart = one.x + one.width <= other.x or other.x + other.width <= one.x
        assert apart or one.y + one.height <= other.y or other.y + other.height <= one.y, "boxes do not overlap"
    for word in drawing.words:
        assert 0 <= word.x and word.x + len(word.text) <= width
        for box in drawing.boxes:
            inside = box.y < word.y < box.y + box.height - 1
            assert not (inside and word.x < box.x + box.width and box.x < word.x + len(word.text.rstrip()))
    for path in drawing.paths:
        for (x1, y1), (x2, y2) in zip(path.points, path.points[1:], strict=False):
            assert x1 == x2 or y1 == y2, "lines are straight"
            assert min(x1, x2) >= 0 and min(y1, y2) >= 0
    assert len(as_text(drawing)) == drawing.height
    assert as_svg(drawing, "a").count("<text") >= len(drawing.words)


def beside(box: Box, x: int, y: int) -> bool:
    """Whether a head at a place stands at this box's left side or below it."""
    return (x == box.x - 1 and box.y < y < box.y + box.height - 1) or (
        y == box.y + box.height and box.x <= x < box.x + box.width
    )


@pytest.mark.parametrize("width", [98, 78, 42])
@pytest.mark.parametrize("source", SOURCES)
def test_every_diagram_of_the_lessons_fits_and_says_all_it_says(source: str, width: int) -> None:
    diagram = read_diagram(source)
    assert diagram is not None
    drawing = lay_out(diagram, width)
    holds(drawing, width)
    text = shown(drawing)
    if isinstance(diagram, Flow):
        said = [*(line for lines in diagram.boxes.values() for line in lines), *(e.label for e in diagram.edges)]
        heads = sum(path.at_end for path in drawing.paths) + sum(path.at_start for path in drawing.paths)
        assert heads == len(diagram.edges) + sum(edge.both for edge in diagram.edges)
        assert len(drawing.boxes) == len(diagram.boxes)
    elif isinstance(diagram, Sequence):
        said = [*diagram.names, *(message.text for message in diagram.messages)]
    else:
        said = [diagram.title, *(task.name for task in diagram.tasks)]
    assert set(re.findall(r"\w+", " ".join(said))) <= set(re.findall(r"\w+", text))


words = st.text("abc", min_size=1, max_size=8)
names = st.sampled_from("ABCDEFG")


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    edges = draw(st.lists(st.builds(Edge, names, names, st.just("") | words, st.booleans()), min_size=1, max_size=9))
    used = dict.fromkeys(name for edge in edges for name in (edge.start, edge.end))
    boxes = {name: draw(st.lists(st.lists(words, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=3))
             for name in used}  # fmt: skip
    groups = {name: draw(words) for name in used if draw(st.booleans())}
    return Flow(boxes, groups, edges)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(flows(), st.integers(60, 100))
def test_any_flowchart_is_laid_out(flow: Flow, width: int) -> None:
    drawing = lay_out(flow, width)
    holds(drawing, width)
    assert len(drawing.boxes) == len(flow.boxes)
    ends = [(path.points[-1], path) for path in drawing.paths if path.at_end]
    assert len(ends) == len(flow.edges)
    for (x, y), _ in ends:
        assert sum(beside(box, x, y) for box in drawing.boxes) == 1, "every head stands at a box"
    labels = {edge.label for edge in flow.edges if edge.label}
    text = shown(drawing)
    assert all(label in text for label in labels)


def test_a_label_that_is_long_has_a_number_and_stands_below() -> None:
    flow = read_diagram("flowchart LR\n A[a] -->|short| B[b]\n B -->|a label that is much longer than that| C[c]")
    assert flow is not None
    text = shown(lay_out(flow, 60))
    assert "─short─▶" in text and f"{NUMBERS[0]} a label that is much longer than that" in text
    assert f"─{NUMBERS[0]}─▶" in text, "the number stands on the arrow too"


def test_boxes_have_the_colour_of_what_the_books_call_them() -> None:
    from shardrun.colours import COLOURS

    flow = read_diagram("flowchart LR\n A[gradients<br/>of the weights] --> B[whole weights] --> C[AdamW] --> D[send]")
    assert flow is not None
    svg = as_svg(lay_out(flow, 90), "a")
    for category in ("gradients", "parameters", "optimizer states"):
        assert svg.count(f'fill="{COLOURS[category]}"') == 1
    styles = {str(span.style) for line in as_text(lay_out(flow, 90)) for span in line.spans}
    assert f"bold {COLOURS['gradients']}" in styles
