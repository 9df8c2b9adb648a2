"""Every frame within 100 × 30, whatever is shown; and nothing that flickers."""

import io
import re
from copy import deepcopy
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from shardrun.lesson.course import course, find_lesson
from shardrun.present.figures import IN_TIME, SHOWN, TELLING_FIRST, Training, bars
from shardrun.present.frame import live, one_step, tables
from shardrun.present.readme import read_readme, with_diagrams
from shardrun.present.record import read_recording
from shardrun.present.screen import FOOT, HEAD, Lines, Screen
from shardrun.present.show import Replayed
from speedrun.books.measured import BESIDE
from strategies.ledger.terms import CATEGORIES as OF_STRATEGIES
from strategies.ledger.terms import MOMENTS as OF_THE_BOOKS
from tests.shardrun.present.conftest import Recorded

WIDTH, HEIGHT = 100, 30
SIZES = [(WIDTH, HEIGHT), (80, 24)]


def terminal(width: int = WIDTH, height: int = HEIGHT) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, highlight=False, record=True)


def plain(content: Any, width: int = WIDTH) -> list[str]:
    """As a terminal of that width shows it, without colours."""
    console = terminal(width)
    console.print(content)
    return console.export_text(styles=False).splitlines()


def trained(recorded: Recorded, world_size: int = 2) -> list[Training]:
    """The training after each of its events; with further ranks that hold and send what the last one does."""
    states, now = [], Training()
    for event in read_recording(recorded.folder):
        if event["kind"] == "books":
            ranks = event["ranks"]
            copies = [{**deepcopy(ranks[-1]), "rank": rank} for rank in range(2, world_size)]
            ranks = deepcopy([*ranks, *copies][:world_size])
            if world_size > 8:  # more collectives than any strategy has
                ranks[0]["traffic"] *= 2
            event = {**event, "ranks": ranks}
        if event["kind"] == "run":
            event = {**event, "world_size": world_size}
        now.take(event)
        states.append(deepcopy(now))
    return states


def test_the_names_are_those_of_the_books() -> None:
    """They are written again because a replay loads no torch."""
    beside = dict.fromkeys(name for names in BESIDE.values() for name in names)
    assert [category.name for category in SHOWN] == [*OF_STRATEGIES, *beside]
    assert set(IN_TIME) == set(TELLING_FIRST) == set(OF_THE_BOOKS)
    assert len({category.letter for category in SHOWN}) == len(SHOWN)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("number", [lesson.number for lesson in course()])
def test_every_text_of_every_lesson_fits(number: int, width: int, height: int) -> None:
    screen = Screen("", auto=0, console=terminal(width, height))
    readme = read_readme(find_lesson(number).folder / "README.md")
    assert len(readme.questions) >= 3
    answers = [f"**{question.text}**\n\n{question.answer}" for question in readme.questions]
    for part in (readme.goal, readme.model, readme.terms, readme.look, *answers):
        pages = screen.pages(part)
        shown = [line for page in pages for line in plain(page, width)]
        for page in pages:
            high = len(plain(page, width)) <= height - HEAD - FOOT
            assert high or "─" in "".join(plain(page, width)), "only a diagram or a table is scrolled"
        assert max(map(cell_len, shown)) <= width
        texts = " ".join(text for kind, text in with_diagrams(part) if kind == "text")
        words = [set(re.findall(r"[^\W\d_]{4,}", each)) for each in (texts, " ".join(shown))]
        assert words[0] - {"text"} <= words[1], "nothing is left out"


@pytest.mark.ranks
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("world_size", [1, 2, 4, 5, 10, 16])
def test_the_live_view_and_the_tables_fit_on_any_number_of_ranks(
    recorded: Recorded, world_size: int, width: int, height: int
) -> None:
    states, room = trained(recorded, world_size), height - HEAD - FOOT
    for state in states:
        state.ddp = {} if world_size == 1 else {"peak": {"parameters": 2**20, "gradients": 2**21}}
        lines = live(state, 12.0, width, room)
        assert len(lines) <= room
        assert max(line.cell_len for line in lines) <= width
    pages = tables(states[-1], width, room)
    for page in pages:
        assert len(page) <= room and max(line.cell_len for line in page) <= width
    shown = "\n".join(line for page in pages for line in plain(Lines(page), width))
    assert [int(rank) for rank in re.findall(r"^(\d+) +parameters", shown, re.M)] == list(range(world_size))
    assert max(line.cell_len for line in one_step(states[-1], width, room)) <= width
    assert len(one_step(states[-1], width, room)) <= room


@pytest.mark.ranks
def test_what_there_is_no_room_for_is_said_to_be_left_out(recorded: Recorded) -> None:
    shown = [line.plain for line in live(trained(recorded, 16)[-1], 0.0, 80, 21)]
    assert any(re.search(r"; \d+ ranks more in the page", line) for line in shown)
    shown = [line.plain for line in live(trained(recorded)[-1], 0.0, 80, 21)]
    assert any(re.search(r"; \d moments? more in the page", line) for line in shown)


@pytest.mark.ranks
def test_the_live_view_shows_what_was_measured_and_what_ddp_would_hold(recorded: Recorded) -> None:
    state = trained(recorded)[-1]
    held = {"parameters": 3 * 2**20, "gradients": 2**20, "optimizer states": 0}
    state.ddp = dict.fromkeys(IN_TIME, held)
    lines = plain(Lines(live(state, 0.0, WIDTH, 27)))
    shown = "\n".join(lines)
    assert "ddp, 2 ranks, fp32, CPU" in shown and "measured in step 8 (MiB)" in shown
    rows = [line for line in lines if re.search(r"[PMGOBAx] +\d+\.\d\d$", line)]
    moments = tuple(moment for moment in IN_TIME if any(line.startswith(moment) for line in rows))
    found = bars(state, moments)
    assert len(rows) >= 6 and "under DDP, predicted" in shown
    assert [bar.rank for bar in found[:3]] == [None, 0, 1], "moment by moment, DDP first"
    assert [float(row.split()[-1]) for row in rows] == [round(bar.total / 2**20, 2) for bar in found]
    most = max(bar.total for bar in found)
    for row, bar in zip(rows, found, strict=True):
        letters = row[24:-10]
        assert len(letters.rstrip()) == round(bar.total / most * len(letters))
        for category in SHOWN:
            exact = bar.bytes.get(category.name, 0) / most * len(letters)
            assert abs(letters.count(category.letter) - exact) <= 1
    for entry in state.ranks[0]["traffic"]:
        assert re.search(rf"{entry['collective']}.* {entry['calls']:,} +{entry['measured']:,} ", shown)


@pytest.mark.ranks
def test_one_step_is_shown_from_its_forward_pass_to_its_update(recorded: Recorded) -> None:
    state = trained(recorded)[-1]
    lines = plain(Lines(one_step(state, WIDTH, 27)))
    shown = "\n".join(lines)
    peak = sum(entry["measured"] for entry in state.ranks[0]["memory"]["peak"].values())
    assert f"at most {peak / 2**20:.2f} MiB" in lines[0]
    assert re.search(r"└forward─*└backward─*└step", shown)
    for entry in state.ranks[0]["traffic"]:
        assert re.search(rf"{entry['collective']}.*: {entry['calls']} calls, {entry['measured']:,} bytes", shown)


@pytest.mark.ranks
def test_the_screen_is_written_over_and_never_cleared(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """All frames of a replay, as they go to a terminal: 30 lines from the upper left corner on, each of 100 columns."""
    monkeypatch.setattr("shardrun.present.show.LONGEST_GAP", 0.0)
    console = terminal()
    screen = Screen("Lesson 4: DDP", auto=0.0, console=console)
    with screen:
        Replayed(find_lesson(4), screen, recorded.folder, read_recording(recorded.folder)).play()
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert output.startswith("\x1b[?1049h") and output.endswith("\x1b[?25h\x1b[?1049l"), (
        "the alternate screen, and back"
    )
    frames = re.sub(r"\x1b\[[\d;]*m|\x1b\[\?\d+[hl]", "", output).split("\x1b[H")[2:]
    assert len(frames) > 30 and not any("\x1b" in frame for frame in frames)
    for frame in frames:
        assert [cell_len(line) for line in frame.split("\n")] == [WIDTH] * HEIGHT
    assert any("measured in step 3" in frame for frame in frames), "the books come while it trains"
