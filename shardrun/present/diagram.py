"""Mermaid diagrams as lines of text, as far as the lessons use them: an arrow a line in flowcharts and sequence
diagrams, a bar in Gantt charts.
"""

import re
import textwrap

WIDTH = 92
"""Columns; a longer arrow goes on below."""

SKIPPED = ("classDef", "class ", "style", "linkStyle", "direction", "%%", "activate", "deactivate", "autonumber")

NODE = re.compile(
    r"\s*(\w+)"
    r"(?:\[\(\"?(.*?)\"?\)\]|\(\[\"?(.*?)\"?\]\)|\[\[\"?(.*?)\"?\]\]|\(\(\"?(.*?)\"?\)\)"
    r"|\[\"(.*?)\"\]|\[(.*?)\]|\(\"(.*?)\"\)|\((.*?)\)|\{\"?(.*?)\"?\})?"
    r"(?::::\w+)?\s*"
)
OPEN_END = re.compile(r"(,|\b(?:a|and|for|from|in|is|of|on|or|the|to|with))$")
"""Where a node's name was broken in the middle of a sentence; elsewhere the next line says something about the name."""
LINKS = (
    re.compile(r"(<?)[-=.]{2,}[>xo]?\|\"?(.*?)\"?\|"),  # -->|label|
    re.compile(r"(<?)(?:--|==|-\.)\s+\"?(.+?)\"?\s+(?:-->|==>|\.->|---|===)"),  # -- label -->
    re.compile(r"(<?)[-=.]{2,}[>xo]?()"),  # -->
)


def arrows(source: str) -> list[str]:
    """The lines, or none where the diagram is of a kind, or has a line, that is not understood."""
    head, *lines = [line.strip() for line in source.strip().splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(SKIPPED)]
    if head.startswith(("flowchart", "graph")):
        found = _flowchart(lines)
    elif head.startswith("sequenceDiagram"):
        found = _sequence(lines)
    elif head.startswith("gantt"):
        return _gantt(lines)
    else:
        found = []
    return [part for line in found for part in textwrap.wrap(line, WIDTH, subsequent_indent="      ")]


def _flowchart(lines: list[str]) -> list[str]:
    labels: dict[str, str] = {}
    groups: dict[str, str] = {}
    edges: list[tuple[str, str, str, str]] = []
    inside: list[str] = []
    for line in lines:
        if line.startswith("subgraph"):
            title = re.search(r"\[\"?(.*?)\"?\]$", line)
            inside.append(title[1] if title else line.partition(" ")[2].strip(' "'))
        elif line == "end" and inside:
            inside.pop()
        elif not _read_chain(line, labels, groups, edges, inside):
            return []
    seen: set[str] = set()

    def named(node: str) -> str:
        """What it is, the first time with all that stands below the name."""
        name, *below = re.split(r"\s*<br\s*/?>\s*", labels.get(node, node))
        if below and OPEN_END.search(name):
            name = " ".join((name, *below))
        elif below and node not in seen:
            rest = " ".join(below)
            name = f"{name} {rest}" if rest.startswith("(") else f"{name} ({rest})"
        seen.add(node)
        return f"{groups[node]}: {name}" if node in groups else name

    told = []
    for start, back, label, end in edges:
        link = f"── {label} ──▶" if label else "──▶"
        told.append(f"{named(start)} {back}{link} {named(end)}")
    return told


def _read_chain(
    line: str, labels: dict[str, str], groups: dict[str, str], edges: list[tuple[str, str, str, str]], inside: list[str]
) -> bool:
    """Take in `A["…"] & B -->|label| C --> D`; whether the whole line was understood."""
    position, before, link = 0, list[str](), ("", "")
    while True:
        nodes: list[str] = []
        while True:
            node = NODE.match(line, position)
            if not node:
                return False
            position = node.end()
            nodes.append(node[1])
            if label := next((text for text in node.groups()[1:] if text), None):
                labels[node[1]] = label
            if inside:
                groups.setdefault(node[1], inside[-1])
            if not line.startswith("&", position):
                break
            position += 1
        edges += [(start, *link, end) for start in before for end in nodes]
        if position >= len(line):
            return True
        found = next((match for pattern in LINKS if (match := pattern.match(line, position))), None)
        if not found:
            return False
        position, before = found.end(), nodes
        link = ("◀" if found[1] else "", re.sub(r"\s*<br\s*/?>\s*", " ", found[2]).strip())


def _sequence(lines: list[str]) -> list[str]:
    names: dict[str, str] = {}
    told = []
    for line in lines:
        if found := re.match(r"(?:participant|actor) (\w+)(?: as (.+))?$", line):
            names[found[1]] = found[2] or found[1]
        elif found := re.match(r"Note .*?:\s*(.+)$", line, re.I):
            told.append(f"— {found[1]} —")
        elif found := re.match(r"(\w+)\s*-+(?:>>?|\)|x)[+-]?\s*(\w+)\s*:\s*(.+)$", line):
            start, end = names.get(found[1], found[1]), names.get(found[2], found[2])
            told.append(f"{start}: {found[3]}" if start == end else f"{start} ──▶ {end}: {found[3]}")
        elif found := re.match(r"(?:loop|par|alt|opt|and|else)\b\s*(.*)$", line):
            told.append(f"— {found[1]} —" if found[1] else "—")
        elif line != "end":
            return []
    return [re.sub(r"\s*<br\s*/?>\s*", " ", line) for line in told]


def _gantt(lines: list[str]) -> list[str]:
    """A bar for every task, on one scale of time; seconds, or whatever its unit is, as the chart says."""
    ends: dict[str, float] = {}
    tasks: list[tuple[str, str, float, float]] = []
    section = title = ""
    for line in lines:
        word, _, rest = line.partition(" ")
        name, _, fields = line.partition(":")
        if word == "title":
            title = rest.strip()
        elif word == "section":
            section = rest.strip()
        elif fields:
            parts = [part.strip() for part in fields.split(",") if part.strip() not in ("crit", "active", "done")]
            amounts = re.fullmatch(r"(?:after (\w+)|([\d.]+)),([\d.]+)[a-z]*", ",".join(parts[-2:]))
            if not amounts or (amounts[1] and amounts[1] not in ends):
                return []
            start = ends[amounts[1]] if amounts[1] else float(amounts[2])
            end = start + float(amounts[3])
            if len(parts) > 2:
                ends[parts[0]] = end
            tasks.append((section, name.strip(), start, end))
            section = ""
        elif word not in ("dateFormat", "axisFormat", "tickInterval"):
            return []
    sections, names = (max(map(len, column)) for column in ([task[0] for task in tasks], [task[1] for task in tasks]))
    scale = max(1, int((WIDTH - sections - names - 4) / max(task[3] for task in tasks)))  # columns per unit of time
    bars = []
    for section, name, start, end in tasks:
        bar = " " * round(start * scale) + "█" * round((end - start) * scale)
        bars.append(f"{section:<{sections}}  {name:<{names}}  {bar}"[:WIDTH])
    return [title, *bars] if title else bars
