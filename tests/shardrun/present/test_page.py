"""The page: nothing in it comes from elsewhere, and its figures are those of the run's own files."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.shardrun.present.conftest import Recorded

pytestmark = pytest.mark.ranks

EMPTY = ("meta", "img", "br", "hr")


class Page(HTMLParser):
    """What a browser would load, and the numbers that a reader sees."""

    def __init__(self, path: Path):
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.bars: list[tuple[str, list[tuple[str, float]]]] = []
        self.points = ""
        self._open: list[str] = []
        self._text = ""
        self._heading = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        self.loaded += [str(given[key]) for key in ("src", "href", "srcset", "data", "xlink:href") if key in given]
        if tag not in EMPTY:
            self._open.append(tag)
        self._text = ""
        if tag == "table":
            self.tables.append((self._heading, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag == "svg" and str(given.get("aria-label", "")).startswith("rank "):
            self.bars.append((str(given["aria-label"]), []))
        elif tag == "rect" and "x" in given:
            self.bars[-1][1].append(("", float(str(given["width"]))))
        elif tag == "polyline":
            self.points = str(given["points"])

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append(self._text)
        elif tag in ("h2", "h3"):
            self._heading = self._text
        elif tag == "title" and "svg" in self._open:
            self.bars[-1][1][-1] = (self._text, self.bars[-1][1][-1][1])


@pytest.fixture(scope="module")
def page(recorded: Recorded) -> Page:
    return Page(recorded.folder / "page.html")


@pytest.fixture(scope="module")
def ranks(recorded: Recorded) -> list[dict[str, Any]]:
    return json.loads((recorded.folder / "run/ledger.json").read_text())["ranks"]


def test_nothing_is_loaded_from_elsewhere(page: Page, recorded: Recorded) -> None:
    assert page.loaded and all(address.startswith("data:image/png;base64,") for address in page.loaded)
    assert not {"script", "link", "iframe", "object", "embed", "base", "a"} & set(page.tags)
    text = (recorded.folder / "page.html").read_text()
    assert "url(" not in text and "@import" not in text and "http-equiv" not in text
    assert 'name="viewport"' in text


def test_the_memory_tables_are_the_ledger(page: Page, ranks: list[dict[str, Any]]) -> None:
    tables = {heading.lower(): rows for heading, rows in page.tables}
    for moment in ("after prepare", "after forward", "peak", "after backward", "after step"):
        expected = {
            (str(rank["rank"]), name): [f"{entry[key]:,}" for key in ("predicted", "measured")]
            for rank in ranks
            for name, entry in rank["memory"][moment].items()
            if entry["predicted"] or entry["measured"]
        }
        head, *rows = tables[moment]
        assert head == ["rank", "what", "predicted", "measured", "remainder"]
        assert {(row[0], row[1]): row[2:4] for row in rows} == expected, moment
        for row in rows:
            number = [int(cell.rstrip("*").replace(",", "")) for cell in row[2:]]
            assert number[1] - number[0] == number[2]
            assert row[4].endswith("*") == ("why" in ranks[int(row[0])]["memory"][moment][row[1]])


def test_the_traffic_table_is_the_ledger(page: Page, ranks: list[dict[str, Any]]) -> None:
    (rows,) = (rows for heading, rows in page.tables if heading == "Handed to collectives in a step")
    expected = [
        [
            f"{rank['rank']}",
            line["calls"],
            f"{line['predicted']:,}",
            f"{line['measured']:,}",
            f"{line['ring_bytes']:,.0f}",
        ]
        for rank in ranks
        for line in rank["traffic"]
    ]
    found = [[row[0], int(row[1].split("×")[1].split()[0]), row[2], row[3], row[5]] for row in rows[1:]]
    assert found == expected and len(found) > 4


def test_bars_are_as_long_as_their_bytes(page: Page, ranks: list[dict[str, Any]]) -> None:
    assert len(page.bars) == 2 * 5
    most = max(sum(e["measured"] for e in held.values()) for rank in ranks for held in rank["memory"].values())
    for label, parts in page.bars:
        rank, moment = label.split(":")[0].split(", ")
        held = ranks[int(rank.split()[1])]["memory"][moment]
        expected = {name: entry["measured"] for name, entry in held.items() if entry["measured"]}
        assert {
            title.split(":")[0]: int(title.split(": ")[1].split()[0].replace(",", "")) for title, _ in parts
        } == expected
        for title, width in parts:
            assert width == pytest.approx(expected[title.split(":")[0]] / most * 1000, abs=0.01)
        assert f"{sum(expected.values()) / 2**20:,.2f} MiB" in label


def test_the_curve_and_its_table_are_the_metrics(page: Page, recorded: Recorded) -> None:
    lines = [json.loads(line) for line in (recorded.folder / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines if line.get("train_loss") is not None]
    (rows,) = (rows for _, rows in page.tables if rows[0] == ["step", "training loss"])
    assert rows[1:] == [[str(step), f"{loss:.6f}"] for step, loss in enumerate(losses, start=1)]
    points = [tuple(map(float, point.split(","))) for point in page.points.split()]
    assert len(points) == len(losses) == 9
    assert max(points, key=lambda point: point[1])[0] == pytest.approx(losses.index(min(losses)) / 8 * 1000, abs=0.1)
