"""Mermaid diagrams, as far as the lessons use them, read into plain data: flowcharts, sequences and Gantt charts.

`shardrun/present/layout.py` gives them places, `drawn.py` draws them, as text for terminals and as SVG for pages.
"""

import re
from dataclasses import dataclass, field

SKIPPED = ("classDef", "class ", "style", "linkStyle", "direction", "%%", "activate", "deactivate", "autonumber")

NODE = re.compile(
    r"\s*(\w+)"
    r"(?:\[\(\"?(.*?)\"?\)\]|\(\[\"?(.*?)\"?\]\)|\[\[\"?(.*?)\"?\]\]|\(\(\"?(.*?)\"?\)\)"
    r"|\[\"(.*?)\"\]|\[(.*?)\]|\(\"(.*?)\"\)|\((.*?)\)|\{\"?(.*?)\"?\})?"
    r"(?::::\w+)?\s*"
)
LINKS = (
    re.compile(r"(<?)[-=.]{2,}[>xo]?\|\"?(.*?)\"?\|"),  # -->|label|
    re.compile(r"(<?)(?:--|==|-\.)\s+\"?(.+?)\"?\s+(?:-->|==>|\.->|---|===)"),  # -- label -->
    re.compile(r"(<?)[-=.]{2,}[>xo]?()"),  # -->
)
BREAK = re.compile(r"\s*<br\s*/?>\s*")


@dataclass(frozen=True)
class Edge:
    """An arrow between two boxes; `both`: it has a head at either end."""

    start: str
    end: str
    label: str = ""
    both: bool = False


@dataclass
class Flow:
    """A flowchart: boxes with their lines of text, in the order of the source, and arrows."""

    boxes: dict[str, list[str]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    """Box → the title of what it stands in, for example "rank 0"."""
    edges: list[Edge] = field(default_factory=list)


@dataclass(frozen=True)
class Message:
    """A line of a sequence: an arrow, what one does by itself (start is end), or a note over all (both are empty)."""

    start: str
    end: str
    text: str


@dataclass
class Sequence:
    """Who takes part, by the names that are shown, and what they send each other, in time."""

    names: list[str] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A bar of a Gantt chart; start and end in the chart's own unit."""

    section: str
    name: str
    start: float
    end: float
    critical: bool = False


@dataclass
class Gantt:
    """Bars on one scale of time."""

    title: str = ""
    tasks: list[Task] = field(default_factory=list)


Diagram = Flow | Sequence | Gantt


def read_diagram(source: str) -> Diagram | None:
    """None where the diagram is of a kind, or has a line, that is not understood."""
    head, *lines = [line.strip() for line in source.strip().splitlines() if line.strip()] or [""]
    lines = [line for line in lines if not line.startswith(SKIPPED)]
    if head.startswith(("flowchart", "graph")):
        return _flow(lines)
    if head.startswith("sequenceDiagram"):
        return _sequence(lines)
    return _gantt(lines) if head.startswith("gantt") else None


def _flow(lines: list[str]) -> Flow | None:
    flow, inside = Flow(), list[str]()
    for line in lines:
        if line.startswith("subgraph"):
            title = re.search(r"\[\"?(.*?)\"?\]$", line)
            inside.append(title[1] if title else line.partition(" ")[2].strip(' "'))
        elif line == "end" and inside:
            inside.pop()
        elif not _read_chain(line, flow, inside):
            return None
    return flow


def _read_chain(line: str, flow: Flow, inside: list[str]) -> bool:
    """Take in `A["…"] & B -->|label| C --> D`; whether the whole line was understood."""
    position, before, link = 0, list[str](), ("", "")
    while True:
        nodes: list[str] = []
        while True:
            node = NODE.match(line, position)
            if not node:
                return False
            position = node.end()
            nodes.append(name := node[1])
            flow.boxes.setdefault(name, [name])
            if label := next((text for text in node.groups()[1:] if text), None):
                flow.boxes[name] = BREAK.split(label)
            if inside:
                flow.groups.setdefault(name, inside[-1])
            if not line.startswith("&", position):
                break
            position += 1
        flow.edges += [Edge(start, end, link[1], bool(link[0])) for start in before for end in nodes]
        if position >= len(line):
            return True
        found = next((match for pattern in LINKS if (match := pattern.match(line, position))), None)
        if not found:
            return False
        position, before = found.end(), nodes
        link = (found[1], BREAK.sub(" ", found[2]).strip())


def _sequence(lines: list[str]) -> Sequence | None:
    result, names = Sequence(), dict[str, str]()

    def named(name: str) -> str:
        shown = names.setdefault(name, name)
        if shown not in result.names:
            result.names.append(shown)
        return shown

    for line in (BREAK.sub(" ", line) for line in lines):
        if found := re.match(r"(?:participant|actor) (\w+)(?: as (.+))?$", line):
            names[found[1]] = found[2] or found[1]
            named(found[1])
        elif found := re.match(r"Note .*?:\s*(.+)$", line, re.I):
            result.messages.append(Message("", "", found[1]))
        elif found := re.match(r"(\w+)\s*-+(?:>>?|\)|x)[+-]?\s*(\w+)\s*:\s*(.+)$", line):
            result.messages.append(Message(named(found[1]), named(found[2]), found[3]))
        elif found := re.match(r"(?:loop|par|alt|opt|and|else)\b\s*(.*)$", line):
            result.messages.append(Message("", "", found[1] or "or"))
        elif line != "end":
            return None
    return result


def _gantt(lines: list[str]) -> Gantt | None:
    chart, ends, section = Gantt(), dict[str, float](), ""
    for line in lines:
        word, _, rest = line.partition(" ")
        name, _, fields = line.partition(":")
        if word == "title":
            chart.title = rest.strip()
        elif word == "section":
            section = rest.strip()
        elif fields:
            marks = [part.strip() for part in fields.split(",")]
            parts = [part for part in marks if part not in ("crit", "active", "done")]
            amounts = re.fullmatch(r"(?:after (\w+)|([\d.]+)),([\d.]+)[a-z]*", ",".join(parts[-2:]))
            if not amounts or (amounts[1] and amounts[1] not in ends):
                return None
            start = ends[amounts[1]] if amounts[1] else float(amounts[2])
            end = start + float(amounts[3])
            if len(parts) > 2:
                ends[parts[0]] = end
            chart.tasks.append(Task(section, name.strip(), start, end, "crit" in marks))
        elif word not in ("dateFormat", "axisFormat", "tickInterval"):
            return None
    return chart if chart.tasks else None
