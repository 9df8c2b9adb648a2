"""The live view and the tables of a presentation in the terminal, as lines of text that fit it.

A bar is made of letters, one for each category, so that it can be read without colours.
"""

import textwrap
from collections.abc import Sequence

from rich.text import Text

from shardrun.colours import ACCENT, REFERENCE, SENT
from shardrun.present.figures import IN_TIME, SHOWN, TELLING_FIRST, Bar, Training, bars, sent_by_kind
from shardrun.tables import mib
from strategies.ledger.book import LedgerLine, digits, summary_lines, traffic_lines, unexplained, verdict

LEVELS = "▁▂▃▄▅▆▇█"
NAMES, AMOUNTS = 24, 10
"""Columns to the left of a bar, and to its right."""
FIXED = 11
"""Lines of the live view beside bars and collectives, at most."""


def live(training: Training, seconds: float, width: int, height: int) -> list[Text]:
    """The view of a run that goes on, or has ended: at most `height` lines of at most `width` columns, from 21 × 80."""
    about = training.about
    if not about:
        return [Text(f"Starting the ranks … {seconds:.0f} s", style="dim")]
    lines = [*command(about["command"], width)[:3], _steps(training, width), _loss(training, width), Text("")]
    if not training.ranks:
        return [*lines, Text("The books are kept for the first time in step 3; nothing has been measured yet.", "dim")]
    room = max(6, height - FIXED)
    collectives = _collectives(training, width, max(2, room // 3))
    return [*lines, *_memory(training, width, room - max(1, len(collectives) - 1)), Text(""), *collectives]


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
        ("━" * filled, ACCENT),
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
    return Text.assemble("training loss ", (curve, ACCENT), f" {losses[0]:.3f} → {losses[-1]:.3f}{last}")


def _memory(training: Training, width: int, room: int) -> list[Text]:
    """The most telling moments that there is room for, each with all its ranks; of very many ranks the first."""
    ranks = training.ranks
    each = len(ranks) + bool(training.ddp)
    telling = [moment for moment in TELLING_FIRST if any(moment in rank["memory"] for rank in ranks)]
    wanted = telling[: max(1, room // each)]
    found = bars(training, tuple(moment for moment in IN_TIME if moment in wanted))
    most = max((bar.total for bar in found), default=0)
    head = f"What every rank holds, measured in step {training.books['step']} (MiB)"
    if len(found) > room:
        left_out = len(found) - room
        found = found[:room]
        head += f"; {left_out} rank{'s' * (left_out > 1)} more in the page"
    elif len(wanted) < len(telling):
        more = len(telling) - len(wanted)
        head += f"; {more} moment{'s' * (more > 1)} more in the page"
    lines = [Text(head, "bold")]
    for i, bar in enumerate(found):
        first = not i or found[i - 1].moment != bar.moment
        name = f"{bar.moment if first else '':<15}{bar.name}"
        lines.append(Text.assemble(f"{name:<{NAMES}}", *_filled(bar, most, width - NAMES - AMOUNTS), _amount(bar)))
    held = {name for bar in found if bar.rank is not None for name, amount in bar.bytes.items() if amount}
    return [*lines, *_legend(held, width, bool(training.ddp))]


def _amount(bar: Bar) -> tuple[str, str]:
    return f" {mib(bar.total):>9}", REFERENCE if bar.rank is None else ""


def _filled(bar: Bar, most: int, room: int) -> list[tuple[str, str]]:
    """A bar's parts; each ends where the sum of all up to it does, so that the whole is as long as it should be."""
    parts, total, end = [], 0, 0
    for category in SHOWN:
        total += bar.bytes.get(category.name, 0)
        next_end = round(total / most * room) if most else 0
        colour = REFERENCE if bar.rank is None else category.colour
        parts.append((category.letter * (next_end - end), f"black on {colour}"))
        end = next_end
    return [*parts, (" " * (room - end), "")]


def _legend(held: set[str], width: int, ddp: bool) -> list[Text]:
    entries = [
        Text.assemble((category.letter, f"black on {category.colour}"), f" {category.name}  ")
        for category in SHOWN
        if category.name in held
    ]
    if ddp:
        entries.append(Text.assemble((" ", f"on {REFERENCE}"), " under DDP, predicted"))
    lines = [Text()]
    for entry in entries:
        if lines[-1].cell_len + entry.cell_len > width:
            lines.append(Text())
        lines[-1].append_text(entry)
    return lines


def _collectives(training: Training, width: int, room: int) -> list[Text]:
    """What rank 0 sends, in so many lines below a heading."""
    rank = training.ranks[0]
    if not rank["traffic"]:
        return [Text("One rank sends nothing.", "dim")]
    names = width - 38
    head = f"What rank {rank['rank']} hands to collectives in a step"
    lines = [Text(f"{head:<{names}}{'calls':>8}{'bytes':>14}{'on a ring':>16}", "bold")]
    shown = rank["traffic"]
    if len(shown) > room:
        shown = shown[: room - 1]
    for entry in shown:
        name = entry["collective"] + (" (norm, flags)" if entry["purpose"] == "bookkeeping" else "")
        ring = f"{entry['ring_bytes']:,.0f}"
        lines.append(Text(f"  {name:<{names - 2}}{entry['calls']:>8,}{entry['measured']:>14,}{ring:>16}"))
    if more := len(rank["traffic"]) - len(shown):
        lines.append(Text(f"  and {more} more, in the page", "dim"))
    return lines


def one_step(training: Training, width: int, height: int) -> list[Text]:
    """The step as it went on rank 0: what was held at each point of it, stacked, and below that what was sent when."""
    line = training.timeline
    if not line or not line["held"]:
        return [Text("The run was too short for books, or its recording is older than its timeline.")]
    held, room = line["held"], width - AMOUNTS
    points = len(held)
    columns = min(room, points * max(1, room // points))
    at = [min(points - 1, i * points // columns) for i in range(columns)]
    most = max(sum(point.values()) for point in held) or 1
    sent = sent_by_kind(line)
    names_held = {name for point in held for name in point}
    legend = _legend(names_held, width, ddp=False)
    rows = max(4, height - 2 - 2 * len(sent) - len(legend))
    lines = [Text(f"One step on rank 0, from left to right: what it held, at most {mib(most)} MiB", "bold")]
    stacks = [_stack(held[point], most, rows) for point in at]
    for row in reversed(range(rows)):
        scale = mib(most) if row == rows - 1 else mib(most / 2) if row == rows // 2 - 1 else ""
        cells = [stack[row] if row < len(stack) else (" ", "") for stack in stacks]
        lines.append(Text.assemble(f"{scale:>{AMOUNTS - 1}} ", *cells))
    lines.append(_phases(line["phases"], points, columns))
    for name, calls in sent.items():
        marks = [" "] * columns
        for point, _ in calls:
            marks[min(columns - 1, point * columns // points)] = "▲"
        lines.append(Text.assemble(" " * AMOUNTS, ("".join(marks), f"bold {SENT}")))
        amount = sum(amount for _, amount in calls)
        lines.append(Text(f"{'':{AMOUNTS}}{name}: {len(calls)} calls, {amount:,} bytes", "dim"))
    return [*lines, *legend]


def _stack(point: dict[str, int], most: int, rows: int) -> list[tuple[str, str]]:
    """A column from its foot to its top."""
    cells: list[tuple[str, str]] = []
    total = 0
    for category in SHOWN:
        total += point.get(category.name, 0)
        cells += [(category.letter, f"black on {category.colour}")] * (round(total / most * rows) - len(cells))
    return cells


def _phases(phases: list[list[object]], points: int, columns: int) -> Text:
    """Below the columns: which phase they belong to."""
    line = Text(" " * AMOUNTS)
    starts = [int(first) * columns // points for _, first, _ in phases]  # type: ignore[call-overload]
    for (name, *_), start, end in zip(phases, starts, [*starts[1:], columns], strict=True):
        room = max(0, end - start - 1)
        line.append(f"└{str(name)[:room]:─<{room}}"[: end - start], "bold")
    return line


def tables(training: Training, width: int, height: int) -> list[list[Text]]:
    """The books at the end, in pages of at most `height` lines: memory of every rank, then what each sends."""
    ranks = training.ranks
    if not ranks:
        return [[Text("The run was too short for books: they are kept in its third step for the first time.")]]
    memory = "What every rank holds just before the update"
    end = [Text(""), *(Text(line) for line in textwrap.wrap(verdict(unexplained(ranks), len(ranks)), width))]
    pages = _table(memory, [summary_lines(rank) for rank in ranks], width, height - len(end))
    if any(rank["traffic"] for rank in ranks):
        sent = "What every rank hands to collectives in a step"
        pages += _table(sent, [traffic_lines(rank) for rank in ranks], width, height - len(end))
    pages[-1] += end
    return pages


def _table(title: str, groups: Sequence[Sequence[LedgerLine]], width: int, height: int) -> list[list[Text]]:
    """Whole ranks to a page, as many as there is room for."""
    names = max((len(line.what) for lines in groups for line in lines), default=0) + 1
    head = [
        Text(f"{title}, in bytes", "bold"),
        Text(f"{'rank':<6}{'':<{names}}{'predicted':>14}{'measured':>14}{'remainder':>12}", "dim"),
    ]
    pages: list[list[Text]] = []
    room = 0
    for lines in groups:
        rows = [row for i, line in enumerate(lines) for row in _row(line, not i, names, width)]
        if not pages or len(rows) > room:
            pages.append([*head])
            room = height - len(head)
        pages[-1] += rows
        room -= len(rows)
    return pages


def _row(line: LedgerLine, first: bool, names: int, width: int) -> list[Text]:
    numbers = f"{digits(line.predicted):>14}{line.measured:>14,}{digits(line.remainder, sign=True):>12}"
    style = "" if not line.remainder else "dim" if line.why else "bold red"
    why = textwrap.wrap(f"({line.why})", width - 8) if line.why else []
    row = Text(f"{line.rank if first else '':<6}{line.what:<{names}}{numbers}", style)
    return [row, *(Text(f"{'':<8}{part}", "dim") for part in why)]
