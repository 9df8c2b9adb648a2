"""The page: nothing in it comes from elsewhere, and its figures are those of the run's own files."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from shardrun.colours import REFERENCE
from shardrun.present.figures import Training, bars
from shardrun.present.page import _memory
from shardrun.present.printed import printed
from shardrun.present.record import read_recording
from shardrun.present.reference import under_ddp
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
        self._bar = False
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
        elif tag == "svg":
            self._bar = str(given.get("aria-label", "")).startswith("rank ")
            if self._bar:
                self.bars.append((str(given["aria-label"]), []))
        elif tag == "rect" and "x" in given and self._bar:
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
        elif tag == "title" and "svg" in self._open and self._bar:
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
    assert len(page.bars) == 2 * 5  # DDP is not compared with itself
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


def test_the_diagram_is_boxes_and_arrows_for_a_screen_and_for_a_phone(recorded: Recorded) -> None:
    text = (recorded.folder / "page.html").read_text()
    model = text[text.index("Mental model") : text.index("<h2>Terms")]
    assert model.count("<svg class=diagram") == 2 and "on-screen" in model and "on-phone" in model
    for diagram in re.findall(r"<svg class=diagram.*?</svg>", model, re.S):
        assert diagram.count("<polygon class=head") == 4, "two buckets, there and back"
        assert diagram.count("<rect class=box") == 6


def test_one_step_is_an_area_and_a_mark_for_each_call(recorded: Recorded, ranks: list[dict[str, Any]]) -> None:
    text = (recorded.folder / "page.html").read_text()
    step = text[text.index("<h2>One step") : text.index("<h2>The books")]
    assert {"forward", "backward", "step"} == set(re.findall(r"<i style=[^>]*>(\w+)</i>", step))
    assert step.count("<rect") == sum(line["calls"] for line in ranks[0]["traffic"])


def test_ddps_bars_stand_in_grey_beside_those_of_another_strategy(recorded: Recorded) -> None:
    training = Training()
    for event in read_recording(recorded.folder):
        training.take(event)
    training.ddp = under_ddp(other_strategy(recorded.folder))
    found = bars(training)
    assert [bar.name for bar in found] == ["DDP", "rank 0", "rank 1"] * 5
    shown = _memory(training)
    assert shown.count('class="bar reference"') == 5 and shown.count(REFERENCE) >= 10
    assert "under DDP, predicted" in shown


def other_strategy(folder: Path) -> dict[str, Any]:
    """The run's config.json, as if it had been launched under FSDP."""
    config = json.loads((folder / "run/config.json").read_text())
    assert under_ddp(config) == {}, "DDP is not compared with itself"
    config["launch"]["strategy"] = "fsdp"
    return config


def test_what_ddp_would_hold_is_what_it_was_predicted_to_hold_where_it_ran(
    recorded: Recorded, ranks: list[dict[str, Any]]
) -> None:
    for moment, held in under_ddp(other_strategy(recorded.folder)).items():
        expected = {name: line["predicted"] for name, line in ranks[0]["memory"][moment].items()}
        assert {name: held.get(name, 0) for name in expected} == expected, moment


def test_a_table_of_a_demo_is_a_table_of_the_page(recorded: Recorded, page: Page) -> None:
    text = next(event for event in read_recording(recorded.folder) if event["kind"] == "output")["text"]
    found = {tuple(rows[0]) for heading, rows in page.tables if heading == "The demo"}
    assert ("", "weights: from one process", "all-reduces", "bytes a step") in found
    for kind, rows in printed(text):
        if kind == "table":
            assert len({len(row) for row in rows}) == 1 and tuple(rows[0]) in found
    words = {word for _, rows in printed(text) for row in rows for word in " ".join(row).split()}
    assert set(text.split()) - words == {word for word in text.split() if set(word) == {"─"}}, "nothing is left out"
