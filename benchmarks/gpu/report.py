"""Markdown of what the parts found."""

from typing import Any

from benchmarks.gpu.parts import PARTS

NO_CARD = "no card: tiny sizes, no figure here is a GPU's"


def report(state: dict[str, Any]) -> str:
    """The whole table of a card: every part in order, those not yet run too."""
    machine = state["machine"]
    lines = [f"# {state['card']}", ""]
    if state["tiny"]:
        lines += [f"**{NO_CARD}.**", ""]
    lines += ["Written by `python -m benchmarks.gpu`, whose docstring says what is what.", ""]
    lines += [*table([{"": name, "value": value} for name, value in machine.items()]), ""]
    lines += ["The machine of the latest call; a part from another one says so.", ""]
    for part in PARTS:
        record = state["parts"].get(part.name)
        lines += [f"## {part.title} (`{part.name}`)", ""]
        lines += [*section(record, machine, state["tiny"]), ""] if record else ["Not yet run.", ""]
    return "\n".join(lines)


def section(record: dict[str, Any], machine: dict[str, Any], tiny: bool) -> list[str]:
    """A part's record: how it went, on what, what it found, and its last lines where it did not end well."""
    where = ", ".join(f"{name} {shown(record['machine'][name])}" for name in record["machine"] if is_rate(name))
    lines = [f"{record['status']}, {record['seconds']:.0f} s, {record['when']}, commit {record['commit']}; {where}."]
    was = record["machine"]
    other = [f"{name} {was.get(name)}" for name in machine if not is_rate(name) and was.get(name) != machine[name]]
    if other:
        lines += ["", f"On another machine: {', '.join(other)}."]
    result = record["result"]
    lines += ["", *(f"- {note}" for note in result["notes"])] if result["notes"] else []
    for title, rows in result["tables"].items():
        lines += ["", f"{title}{f' ({NO_CARD})' if tiny else ''}:", "", *table(rows)]
    if record["last lines"]:
        lines += ["", "The end of what it printed:", "", "```", *record["last lines"], "```"]
    return lines


def is_rate(name: str) -> bool:
    """Whether a field of the machine is a measurement (card.py)."""
    return name.startswith("rate of ")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of named cells; a column of numbers stands to the right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    numbers = {name for name in columns if all(isinstance(row.get(name), int | float | None) for row in rows)}
    return [
        f"| {' | '.join(columns)} |",
        "|" + "".join("---:|" if name in numbers else "---|" for name in columns),
        *(f"| {' | '.join(shown(row.get(name)) for name in columns)} |" for row in rows),
    ]


def shown(value: Any) -> str:
    """A cell: whole numbers with their thousands, others with four digits, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
