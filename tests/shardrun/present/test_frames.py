"""Every frame within 100 × 30, whatever is shown; and nothing that flickers."""

import io
import re
from copy import deepcopy
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from shardrun.lesson.course import course, find_lesson
from shardrun.present import Replayed
from shardrun.present.figures import IN_TIME, SHOWN, TELLING_FIRST, Training, bars
from shardrun.present.frame import live, tables
from shardrun.present.readme import read_readme
from shardrun.present.record import read_recording
from shardrun.present.screen import FOOT, HEAD, Screen, text
from speedrun.books.measured import BESIDE
from strategies.ledger.terms import CATEGORIES as OF_STRATEGIES
from strategies.ledger.terms import MOMENTS as OF_THE_BOOKS
from tests.shardrun.present.conftest import Recorded

WIDTH, HEIGHT = 100, 30


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=WIDTH, height=HEIGHT, highlight=False, record=True)


def plain(content: Any) -> list[str]:
    """As a terminal of that size shows it, without colours."""
    console = terminal()
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


@pytest.mark.parametrize("number", [lesson.number for lesson in course()])
def test_every_text_of_every_lesson_fits(number: int) -> None:
    screen = Screen("", auto=0, console=terminal())
    readme = read_readme(find_lesson(number).folder / "README.md")
    assert "```mermaid" not in readme.model, "a diagram that cannot be shown in a terminal"
    assert len(readme.questions) >= 3
    answers = [f"**{question.text}**\n\n{question.answer}" for question in readme.questions]
    for part in (readme.goal, readme.model, readme.terms, readme.look, *answers):
        pages = screen.pages(part)
        shown = [line for page in pages for line in plain(page)]
        for page in pages:
            assert len(plain(page)) <= HEIGHT - HEAD - FOOT
        words = [set(re.findall(r"[^\W\d_]{4,}", each)) for each in (part, " ".join(shown))]
        assert words[0] - {"text"} <= words[1], "nothing is left out"


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8, 10, 16])
def test_the_live_view_and_the_tables_fit_on_any_number_of_ranks(recorded: Recorded, world_size: int) -> None:
    states = trained(recorded, world_size)
    for state in states:
        lines = live(state, 12.0, WIDTH)
        assert len(lines) <= HEIGHT - HEAD - FOOT
        assert len(plain(text(lines))) == len(lines), "no line takes two"
    for page in tables(states[-1], HEIGHT - HEAD - FOOT):
        assert len(plain(text(page))) <= HEIGHT - HEAD - FOOT
    shown = "\n".join(line for page in tables(states[-1], 27) for line in plain(text(page)))
    assert [int(rank) for rank in re.findall(r"^(\d+) +parameters", shown, re.M)] == list(range(world_size))


@pytest.mark.ranks
def test_the_live_view_shows_what_was_measured(recorded: Recorded) -> None:
    state = trained(recorded)[-1]
    lines = plain(text(live(state, 0.0, WIDTH)))
    shown = "\n".join(lines)
    assert "ddp, 2 ranks, fp32, CPU" in shown and "measured in step 8 (MiB)" in shown
    found = bars(state.ranks)
    rows = [line for line in lines if re.search(r"[PMGOBAx] +\d+\.\d\d$", line)]
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
def test_the_screen_is_written_over_and_never_cleared(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """All frames of a replay, as they go to a terminal: 30 lines from the upper left corner on, each of 100 columns."""
    monkeypatch.setattr("shardrun.present.LONGEST_GAP", 0.0)
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
