"""The live view and the tables of a presentation in the terminal, as lines of text that fit it.

A bar is made of letters, one for each category, so that it can be read without colours.
"""

import textwrap
from collections.abc import Sequence

from rich.text import Text

from shardrun.present.figures import IN_TIME, SHOWN, TELLING_FIRST, Bar, Training, bars
from shardrun.tables import mib
from strategies.ledger.book import LedgerLine, digits, summary_lines, traffic_lines, unexplained, verdict

BAR_ROWS = 10
"""Lines that the bars take at most."""
COLLECTIVE_ROWS = 6
LEVELS = "▁▂▃▄▅▆▇█"
NAMES, AMOUNTS = 24, 10
"""Columns to the left of a bar, and to its right."""


def live(training: Training, seconds: float, width: int) -> list[Text]:
    """The view of a run that goes on, or has ended: at most 27 lines of at most `width` columns."""
    about = training.about
    if not about:
        return [Text(f"Starting the ranks … {seconds:.0f} s", style="dim")]
    lines = [*command(about["command"], width)[:3], _steps(training, width), _loss(training, width), Text("")]
    if not training.ranks:
        return [*lines, Text("The books are kept for the first time in step 3; nothing has been measured yet.", "dim")]
    return [*lines, *_memory(training, width), Text(""), *_collectives(training)]


def command(words: str, width: int) -> list[Text]:
    """A command on as many lines as it takes."""
    lines = textwrap.wrap(f"$ {words}", width, subsequent_indent="      ", break_on_hyphens=False)
    return [Text(line, "dim") for line in lines]


def _steps(training: Training, width: int) -> Text:
    about = training.about
    done = training.steps[-1]["step"] if training.steps else 0
    total = max(about["steps"], done)
    room = max(10, width - 62)
    filled = round(room * done / total) if total else 0
    pace = f"{training.step_ms:.0f} ms a step" if training.step_ms is not None else ""
    ranks = f"{about['world_size']} rank" + ("s" if about["world_size"] > 1 else "")
    where = f"{about['strategy']}, {ranks}, {about['precision']}, {'CPU' if about['cpu'] else 'GPU'}"
    return Text.assemble(
        f"step {done:>3} of {total}  ",
        ("━" * filled, "#0072B2"),
        ("─" * (room - filled), "dim"),
        f"  {pace:<14} {where}",
    )


def _loss(training: Training, width: int) -> Text:
    """The training loss as a row of bars, a step each while there is room, else the mean of some."""
    losses = [loss for _, loss in training.losses]
    if not losses:
        return Text("")
    room = max(10, width - 50)
    size = -(-len(losses) // room)
    means = [sum(part) / len(part) for part in (losses[i : i + size] for i in range(0, len(losses), size))]
    low, high = min(means), max(means)
    heights = (int((loss - low) / (high - low) * 7.999) if high > low else 3 for loss in means)
    curve = "".join(LEVELS[height] for height in heights)
    validated = [line["val_loss"] for line in training.steps if line.get("val_loss") is not None]
    last = f", validation {validated[-1]:.3f}" if validated else ""
    return Text.assemble("training loss ", (curve, "#0072B2"), f" {losses[0]:.3f} → {losses[-1]:.3f}{last}")


def _memory(training: Training, width: int) -> list[Text]:
    ranks = training.ranks
    shown = ranks[:BAR_ROWS]
    wanted = TELLING_FIRST[: BAR_ROWS // len(shown)]
    found = bars(shown, tuple(moment for moment in IN_TIME if moment in wanted))
    most = max((bar.total for bar in found), default=0)
    room = width - NAMES - AMOUNTS
    head = f"What every rank holds, measured in step {training.books['step']} (MiB)"
    if len(ranks) > len(shown):
        head += f": the first {len(shown)} of {len(ranks)} ranks"
    lines = [Text(head, "bold")]
    for i, bar in enumerate(found):
        first = not i or found[i - 1].rank != bar.rank
        name = f"{f'rank {bar.rank}' if first else '':<8}{bar.moment}"
        lines.append(Text.assemble(f"{name:<{NAMES}}", *_filled(bar, most, room), f" {mib(bar.total):>9}"))
    held = {name for bar in found for name, amount in bar.bytes.items() if amount}
    return [*lines, *_legend(held, width)]


def _filled(bar: Bar, most: int, room: int) -> list[tuple[str, str]]:
    """A bar's parts; each ends where the sum of all up to it does, so that the whole is as long as it should be."""
    parts, total, end = [], 0, 0
    for category in SHOWN:
        total += bar.bytes.get(category.name, 0)
        next_end = round(total / most * room) if most else 0
        parts.append((category.letter * (next_end - end), f"black on {category.colour}"))
        end = next_end
    return [*parts, (" " * (room - end), "")]


def _legend(held: set[str], width: int) -> list[Text]:
    lines = [Text(" " * NAMES)]
    for category in (category for category in SHOWN if category.name in held):
        entry = Text.assemble((category.letter, f"black on {category.colour}"), f" {category.name}  ")
        if lines[-1].cell_len + entry.cell_len > width:
            lines.append(Text(" " * NAMES))
        lines[-1].append_text(entry)
    return lines


def _collectives(training: Training) -> list[Text]:
    ranks = training.ranks
    rank = ranks[0]
    if not rank["traffic"]:
        return [Text("One rank sends nothing.", "dim")]
    head = f"What rank {rank['rank']} hands to collectives in a step"
    lines = [Text(f"{head:<50}{'calls':>8}{'bytes':>16}{'on a ring':>16}", "bold")]
    shown = rank["traffic"]
    if len(shown) > COLLECTIVE_ROWS:
        shown = shown[: COLLECTIVE_ROWS - 1]
    for entry in shown:
        name = entry["collective"] + (" (norm, flags)" if entry["purpose"] == "bookkeeping" else "")
        ring = f"{entry['ring_bytes']:,.0f}"
        lines.append(Text(f"  {name:<48}{entry['calls']:>8,}{entry['measured']:>16,}{ring:>16}"))
    if more := len(rank["traffic"]) - len(shown):
        lines.append(Text(f"  and {more} more, in the page", "dim"))
    return lines


def tables(training: Training, height: int) -> list[list[Text]]:
    """The books at the end, in pages of at most `height` lines: memory of every rank, then what each sends."""
    ranks = training.ranks
    if not ranks:
        return [[Text("The run was too short for books: they are kept in its third step for the first time.")]]
    memory = "What every rank holds just before the update"
    pages = _table(memory, [summary_lines(rank) for rank in ranks], height)
    if any(rank["traffic"] for rank in ranks):
        sent = "What every rank hands to collectives in a step"
        pages += _table(sent, [traffic_lines(rank) for rank in ranks], height)
    pages[-1] += [Text(""), Text(verdict(unexplained(ranks), len(ranks)))]
    return pages


def _table(title: str, groups: Sequence[Sequence[LedgerLine]], height: int) -> list[list[Text]]:
    """Whole ranks to a page, as many as there is room for."""
    head = [
        Text(f"{title}, in bytes", "bold"),
        Text(f"{'rank':<6}{'':<34}{'predicted':>16}{'measured':>16}{'remainder':>14}", "dim"),
    ]
    pages: list[list[Text]] = []
    room = 0
    for lines in groups:
        rows = [row for i, line in enumerate(lines) for row in _row(line, first=not i)]
        if not pages or len(rows) > room:
            pages.append([*head])
            room = height - len(head) - 4  # the verdict's lines on the last one
        pages[-1] += rows
        room -= len(rows)
    return pages


def _row(line: LedgerLine, first: bool) -> list[Text]:
    numbers = f"{digits(line.predicted):>16}{line.measured:>16,}{digits(line.remainder, sign=True):>14}"
    style = "" if not line.remainder else "dim" if line.why else "bold red"
    row = [Text(f"{line.rank if first else '':<6}{line.what:<34}{numbers}", style)]
    return [*row, Text(f"{'':<8}({line.why})", "dim")] if line.why else row
