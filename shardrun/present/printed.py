"""What a demo printed, cut into its tables and the text around them, so that a page can wrap both."""

import re

RULE = re.compile(r"^\s*─+(\s+─+)+\s*$")
"""The line below a table's headings, as lessons.kit.table draws it: it says where each column is."""


def printed(text: str) -> list[tuple[str, list[list[str]]]]:
    """("text", [[line], …]) and ("table", [headings, row, …]), in order; empty lines around them are left out."""
    found: list[tuple[str, list[list[str]]]] = []
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        if i + 1 < len(lines) and RULE.match(lines[i + 1]):
            spans = [match.span() for match in re.finditer(r"─+", lines[i + 1])]
            rows = [_cells(lines[i], spans)]
            i += 2
            while i < len(lines) and lines[i].strip() and _within(lines[i], spans):
                rows.append(_cells(lines[i], spans))
                i += 1
            found.append(("table", rows))
            continue
        if not found or found[-1][0] != "text":
            found.append(("text", []))
        found[-1][1].append([lines[i]])
        i += 1
    for kind, rows in found:
        while kind == "text" and rows and not rows[-1][0].strip():
            rows.pop()
        while kind == "text" and rows and not rows[0][0].strip():
            rows.pop(0)
    return [(kind, rows) for kind, rows in found if rows]


def _cells(line: str, spans: list[tuple[int, int]]) -> list[str]:
    return [line[start:end].strip() for start, end in spans]


def _within(line: str, spans: list[tuple[int, int]]) -> bool:
    """Whether nothing of a line stands between the columns: then it is a row."""
    edges = [0, *(edge for span in spans for edge in span), max(len(line), spans[-1][1])]
    return not any(line[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True))
