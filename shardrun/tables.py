"""Tables and paragraphs for the terminal."""

import textwrap


def table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print a table, within 100 columns where there is no terminal to ask; columns move together before any is cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    cells = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    padding = 1 if sum(cells) + 3 * len(cells) + 1 <= console.width else 0
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, padding))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def wrapped(label: str, text: str) -> None:
    """A paragraph behind a label, within 100 columns."""
    start = f"  {label} " if label else "  "
    print(textwrap.fill(text, 98, initial_indent=start, subsequent_indent=" " * len(start)))


def mib(amount: float, digits: int = 2) -> str:
    """Bytes as MiB, a dash for none."""
    return f"{amount / 2**20:,.{digits}f}" if amount else "–"


def gib(amount: float) -> str:
    """Bytes as GiB, a dash for none."""
    return f"{amount / 2**30:,.2f}" if amount else "–"
