"""The page of a presentation: one HTML file with everything in it, for a phone as for a projector, without a script.

Bars and curves are inline SVG that is stretched to the width there is; all words and numbers are HTML beside it, so
that they keep their size.
"""

import base64
import mimetypes
from collections.abc import Sequence
from html import escape
from pathlib import Path

from shardrun.colours import ACCENT, REFERENCE, SENT
from shardrun.lesson.course import Lesson
from shardrun.output import write_whole
from shardrun.present.diagram import read_diagram
from shardrun.present.drawn import as_svg
from shardrun.present.figures import IN_TIME, SHOWN, Bar, Training, bars, sent_by_kind
from shardrun.present.layout import lay_out
from shardrun.present.printed import printed
from shardrun.present.readme import Readme, with_diagrams
from shardrun.present.record import Event
from shardrun.tables import mib
from strategies.ledger.book import LedgerLine, digits, memory_lines, traffic_lines, unexplained, verdict

NAME = "page.html"

WIDE, NARROW = 96, 42
"""Columns of a diagram on a screen and on a phone."""


def write_page(folder: Path, lesson: Lesson, readme: Readme, output: Event, training: Training | None) -> Path:
    """Write the page into a presentation's folder. output: of demo.py; training: None for a lesson that has none."""
    head = f"Lesson {lesson.number}: {lesson.title}"
    parts = [
        f"<h1>{escape(head)}</h1><p class=about>{escape(lesson.about)}</p>",
        _section("Goal", _html(readme.goal)),
        _section("Mental model", _html(readme.model)),
        _section("Terms", _html(readme.terms)),
        _section("The demo", _output(folder, output)),
        _section("What to look at", _html(readme.look)),
    ]
    if training and training.about:
        parts += [_section("The training", _training(training))]
        if training.ranks:
            parts.append(_section("What every rank holds", _memory(training)))
            if training.timeline.get("held"):
                parts.append(_section("One step", _course(training)))
            parts.append(_section("The books", _books(training)))
    questions = (
        f"<details><summary>{escape(question.text)}</summary>{_html(question.answer)}</details>"
        for question in readme.questions
    )
    parts.append(_section("Questions", "\n".join(questions)))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(head)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + f"\n<footer>Made by <code>shardrun present {lesson.number}</code>.</footer>\n</main></body></html>\n"
    )
    path = folder / NAME
    write_whole(path, page)
    return path


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"


def _html(markdown: str) -> str:
    """Links stay text: the page needs nothing from elsewhere."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
    parts = (_diagram(part) if kind == "diagram" else reader.render(part) for kind, part in with_diagrams(markdown))
    return (
        "\n".join(parts)
        .replace("<table>", '<div class=wide><table class="text">')
        .replace("</table>", "</table></div>")
    )


def _diagram(source: str) -> str:
    """Boxes and arrows, twice: for a screen and for a phone, of which a reader sees one."""
    diagram = read_diagram(source)
    if diagram is None:
        return f"<pre>{escape(source)}</pre>"
    label = "A diagram of what the text above says"
    drawings = (("on-screen", WIDE), ("on-phone", NARROW))
    return "".join(f"<div class={kind}>{as_svg(lay_out(diagram, width), label)}</div>" for kind, width in drawings)


def _output(folder: Path, output: Event) -> str:
    pictures = "".join(_picture(folder / name) for name in output["figures"])
    parts = []
    for kind, lines in printed(output["text"]):
        if kind == "table":
            head, *rows = lines
            parts.append(_table(head, rows, words=1))
        else:
            parts.append(f"<pre>{escape(chr(10).join(line for [line] in lines))}</pre>")
    return f"<p class=command>$ {escape(output['command'])}</p><div class=printed>{''.join(parts)}</div>{pictures}"


def _picture(path: Path) -> str:
    """An image with its bytes in the page; a sentence where the file has gone."""
    if not path.is_file():
        return f"<p>(The picture {escape(path.name)} is not in the recording any more.)</p>"
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem)}" src="data:{kind};base64,{data}">'


def _training(training: Training) -> str:
    about = training.about
    ranks = f"{about['world_size']} rank" + ("s" if about["world_size"] > 1 else "")
    facts = [
        f"{about['strategy']} on {ranks}, {about['precision']}, {'CPU' if about['cpu'] else 'GPU'}",
        f"{about['parameters']:,} parameters",
    ]
    if training.step_ms is not None:
        facts.append(f"{training.step_ms:.0f} ms a step (median of those whose books were not kept)")
    rows = [[f"{step}", f"{loss:.6f}"] for step, loss in training.losses]
    return (
        f"<p class=command>$ {escape(about['command'])}</p><p>{escape('; '.join(facts))}.</p>"
        + _curve(training.losses)
        + f"<details><summary>Every step</summary>{_table(['step', 'training loss'], rows)}</details>"
    )


def _curve(losses: Sequence[tuple[int, float]]) -> str:
    """The training loss by steps."""
    if len(losses) < 2:
        return ""
    values = [loss for _, loss in losses]
    low, high = min(values), max(values)
    span = high - low or 1.0
    first, last = losses[0][0], losses[-1][0]
    points = " ".join(
        f"{(step - first) / (last - first) * 1000:.1f},{(high - loss) / span * 300:.1f}" for step, loss in losses
    )
    label = f"Training loss, {values[0]:.3f} at step {first}, {values[-1]:.3f} at step {last}"
    return (
        f"<figure><div class=curve><div class=axis><span>{high:.2f}</span><span>{low:.2f}</span></div>"
        f'<svg viewBox="0 -6 1000 312" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<polyline points="{points}" fill="none" stroke="{ACCENT}" stroke-width="3" '
        'vector-effect="non-scaling-stroke"/>'
        f"</svg></div><figcaption>{label}.</figcaption></figure>"
    )


def _memory(training: Training) -> str:
    found = bars(training)
    most = max(bar.total for bar in found)
    held = {name for bar in found for name, amount in bar.bytes.items() if amount}
    beside = " Grey: what a rank would hold under DDP, predicted." if training.ddp else ""
    legend = "".join(
        f'<li><svg viewBox="0 0 1 1" aria-hidden="true"><rect width="1" height="1" fill="{category.colour}"/></svg>'
        f"{category.name}</li>"
        for category in SHOWN
        if category.name in held
    )
    parts = [f"<p>Measured in step {training.books['step']}, in MiB.{beside}</p><ul class=legend>{legend}</ul>"]
    for moment in IN_TIME:
        rows = [_bar(bar, most) for bar in found if bar.moment == moment]
        if rows:
            parts.append(f"<h3>{escape(moment[0].upper() + moment[1:])}</h3>" + "\n".join(rows))
    return "\n".join(parts)


def _bar(bar: Bar, most: int) -> str:
    rects, start = [], 0.0
    for category in SHOWN:
        if amount := bar.bytes.get(category.name, 0):
            width = amount / most * 1000
            colour = REFERENCE if bar.rank is None else category.colour
            rects.append(
                f'<rect x="{start:.2f}" width="{width:.2f}" height="10" fill="{colour}">'
                f"<title>{category.name}: {amount:,} bytes</title></rect>"
            )
            start += width
    label = f"{bar.name}, {bar.moment}: {mib(bar.total)} MiB"
    svg = (
        f'<svg viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label="{label}">{"".join(rects)}</svg>'
    )
    kind = "bar reference" if bar.rank is None else "bar"
    return f'<div class="{kind}"><span>{bar.name}</span>{svg}<b>{mib(bar.total)}</b></div>'


def _course(training: Training) -> str:
    """What rank 0 held in the course of the step, stacked, and below it when it sent what."""
    line = training.timeline
    held, points = line["held"], len(line["held"])
    most = max(sum(point.values()) for point in held) or 1
    below, areas = [0.0] * points, []
    for category in SHOWN:
        amounts = [point.get(category.name, 0) / most * 300 for point in held]
        if any(amounts):
            above = [b + a for b, a in zip(below, amounts, strict=True)]
            areas.append(
                f'<path d="{_area(below, above)}" fill="{category.colour}"><title>{category.name}</title></path>'
            )
            below = above
    label = f"What rank 0 holds in the course of a step, at most {mib(most)} MiB"
    parts = [
        "<p>On rank 0, from left to right in the order in which it happened (not in seconds).</p>",
        f"<div class=curve><div class=axis><span>{mib(most)} MiB</span><span>0</span></div>"
        f'<svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" aria-label="{label}">{"".join(areas)}</svg>'
        "</div>",
        "<div class=phases><span></span><div>"
        + "".join(
            f'<i style="left:{first / points:.2%};width:{(last - first) / points:.2%}">{escape(name)}</i>'
            for name, first, last in line["phases"]
        )
        + "</div></div>",
    ]
    for name, calls in sent_by_kind(line).items():
        places = (f'x="{point / points * 1000:.1f}"' for point, _ in calls)
        ticks = "".join(f'<rect {place} width="4" height="10" fill="{SENT}"/>' for place in places)
        total = f"{len(calls)} × {escape(name)}, {sum(amount for _, amount in calls):,} bytes"
        parts.append(
            f"<p class=note>{total}</p><div class=ticks>"
            f'<svg viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label="{total}">{ticks}</svg></div>'
        )
    return "\n".join(parts)


def _area(below: Sequence[float], above: Sequence[float]) -> str:
    """Steps from the left to the right along the top, and back along the foot."""
    wide = 1000 / len(below)
    top = "".join(f"L{i * wide:.1f},{300 - y:.1f}L{(i + 1) * wide:.1f},{300 - y:.1f}" for i, y in enumerate(above))
    foot = "".join(
        f"L{(i + 1) * wide:.1f},{300 - y:.1f}L{i * wide:.1f},{300 - y:.1f}" for i, y in reversed(list(enumerate(below)))
    )
    return f"M{top[1:]}{foot}Z"


def _books(training: Training) -> str:
    """Every line of every rank's books, a table for each moment and one for what is sent."""
    headings = ["rank", "what", "predicted", "measured", "remainder"]
    parts = [f"<p>{escape(verdict(unexplained(training.ranks), len(training.ranks)))} In bytes.</p>"]
    for moment in IN_TIME:
        lines = [line for rank in training.ranks for line in memory_lines(rank, moment)]
        if lines:
            rows, notes = _rows(lines)
            parts.append(f"<h3>{escape(moment[0].upper() + moment[1:])}</h3>{_table(headings, rows, words=2)}{notes}")
    rows, notes = _rows([line for rank in training.ranks for line in traffic_lines(rank)])
    if rows:
        ring = [f"{entry['ring_bytes']:,.0f}" for rank in training.ranks for entry in rank["traffic"]]
        rows = [[*row, on_ring] for row, on_ring in zip(rows, ring, strict=True)]
        parts.append("<h3>Handed to collectives in a step</h3>")
        parts.append(_table([*headings, "on a ring"], rows, words=2) + notes)
    return "\n".join(parts)


def _rows(lines: Sequence[LedgerLine]) -> tuple[list[list[str]], str]:
    """A table's rows, and below it why some remainders are no surprise, marked by stars."""
    reasons = list(dict.fromkeys(line.why for line in lines if line.why))
    rows = []
    for line in lines:
        star = "*" * (reasons.index(line.why) + 1) if line.why else ""
        numbers = [digits(line.predicted), digits(line.measured), digits(line.remainder, sign=True) + star]
        rows.append([f"{line.rank}", line.what, *numbers])
    notes = (f"<p class=note>{'*' * number} {escape(why)}</p>" for number, why in enumerate(reasons, start=1))
    return rows, "".join(notes)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 0) -> str:
    """words: so many columns from the left hold no numbers."""

    def row(cells: Sequence[str], kind: str) -> str:
        marks = (f"<{kind}{' class=word' if i < words else ''}>{escape(cell)}</{kind}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(marks)}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f"<div class=wide><table><thead>{row(headings, 'th')}</thead><tbody>\n{body}\n</tbody></table></div>"
