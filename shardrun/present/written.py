"""A lesson's text for the terminal: Markdown, with its diagrams as boxes and arrows, cut into blocks."""

from rich.console import Group, RenderableType
from rich.markdown import Markdown
from rich.text import Text

from shardrun.present.diagram import read_diagram
from shardrun.present.drawn import as_text
from shardrun.present.layout import lay_out
from shardrun.present.readme import with_diagrams


def rendered(markdown: str, width: int, height: int) -> RenderableType:
    """height: lines that a frame has; a diagram stands closer where it would be higher."""
    parts: list[RenderableType] = []
    for kind, part in with_diagrams(markdown):
        diagram = read_diagram(part) if kind == "diagram" else None
        if diagram:
            lines = as_text(lay_out(diagram, width - 2, height))
            for line in lines:
                line.no_wrap, line.overflow = True, "crop"
            parts += [*([Text("")] if parts else []), *lines]
        else:
            source = f"```text\n{part}```" if kind == "diagram" else part
            parts += [Text("")] if parts else []
            parts.append(Markdown(source, code_theme="ansi_dark", hyperlinks=False))
    return Group(*parts)


def blocks(markdown: str) -> list[str]:
    """The source of each paragraph, table, code block and list entry; one that ends with a colon includes the next."""
    from markdown_it import MarkdownIt

    lines = markdown.splitlines(keepends=True)
    starts = {0}
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        entry = token.type == "list_item_open" and token.level == 1
        if token.map and (token.level == 0 or entry):
            starts.add(token.map[0])
    found: list[str] = []
    ends = [*sorted(starts)[1:], len(lines)]
    for start, end in zip(sorted(starts), ends, strict=True):
        block = "".join(lines[start:end])
        if found and found[-1].rstrip().endswith(":"):
            found[-1] += block
        else:
            found.append(block)
    return found
