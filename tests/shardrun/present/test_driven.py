"""`shardrun present` in pseudo-terminals of 100 × 30 and 80 × 24: every frame fits, and every key does what it says."""

import re
import sys
from pathlib import Path

import pytest

from tests.shardrun.present.conftest import Recorded
from tests.shardrun.present.terminal import Driven, driven, wait_for

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are Unix's"),
]

KEYS = "space next · b back · s skip · p parts · ? note · q end"


def fits(terminal: Driven, width: int, height: int) -> list[str]:
    """The lines of a frame, when all of it has come."""
    wait_for(lambda: len(terminal.screen) == height, 20, "a whole frame")
    lines = terminal.screen
    assert {len(line) for line in lines} == {width}, lines
    return lines


def go_to(terminal: Driven, part: int, name: str) -> None:
    terminal.press("p")
    terminal.expect("go to part")
    terminal.press(f"{part}\n")
    terminal.expect(f"part {part} of 15: {name}")


@pytest.mark.parametrize(("width", "height"), [(100, 30), (80, 24)])
def test_a_replay_from_its_goal_to_its_page(recorded: Recorded, tmp_path: Path, width: int, height: int) -> None:
    with driven("4", "--replay", str(recorded.folder), folder=tmp_path, width=width, height=height) as terminal:
        terminal.expect("part 1 of 15: Goal")
        assert terminal.shows("You can write distributed data parallelism") and terminal.shows(KEYS)
        terminal.press(" ")
        terminal.expect("part 2 of 15: Mental model")
        terminal.press("\x1b[D")
        terminal.expect("part 1 of 15: Goal")
        terminal.press("?")
        terminal.expect("Note: One minute.")
        fits(terminal, width, height)
        terminal.press("?")
        go_to(terminal, 4, "Guess first")
        terminal.expect("How many bytes of gradients per")
        terminal.press("8\n")
        terminal.expect("part 5 of 15: demo.py")
        seen = {5}
        for _ in range(40):  # to the first question, and every frame is as large as the terminal
            head = fits(terminal, width, height)[0]
            part = int(re.findall(r"part (\d+) of 15", head)[0])
            seen.add(part)
            if part >= 10:
                break
            wait_for(lambda: terminal.shows("? note"), 60, "the end of what runs")  # no key brings it sooner
            before = terminal.screen[0]
            terminal.press("n")
            wait_for(lambda before=before: terminal.screen[0] != before, 60, "another frame")
        assert seen == {5, 6, 7, 8, 9, 10}
        written = terminal.read()
        assert "Your guess: 8 bytes per parameter, 2 times as much." in written
        assert "measured in step" in written and "One step on rank 0" in written
        assert terminal.shows("Question 1 of 5") and not terminal.shows("The step is local"), "the answer waits"
        terminal.press("n")
        terminal.expect("The step is local")
        terminal.press("s")
        terminal.expect("part 11 of 15: Question 2 of 5")
        terminal.press("q")
        assert "Page: " in terminal.end()
    assert terminal.process.returncode == 0


def test_what_is_wider_or_higher_than_the_screen_is_scrolled(recorded: Recorded, tmp_path: Path) -> None:
    with driven("4", "--replay", str(recorded.folder), folder=tmp_path, width=80, height=14) as terminal:
        terminal.expect("part 1 of 15")
        go_to(terminal, 2, "Mental model")
        terminal.press("n")
        terminal.expect("lines more: j")
        first = terminal.screen[2]
        terminal.press("j")
        terminal.expect("3 above: k")
        assert first not in terminal.screen[2]
        terminal.press("k")
        wait_for(lambda: terminal.screen[2] == first, 20, "the first line")
        terminal.press("q")
    with driven("4", "--replay", str(recorded.folder), folder=tmp_path, width=60, height=24) as terminal:
        terminal.expect("part 1 of 15")
        go_to(terminal, 5, "demo.py")
        terminal.expect("columns more: >")
        terminal.press(">")
        terminal.expect("← <")
        assert terminal.shows("all-reduces")
        terminal.press("q")


def test_a_demo_is_seen_as_it_prints_and_can_be_skipped(tmp_path: Path, warm_python: str) -> None:
    with driven("14", folder=tmp_path, width=80, height=24) as terminal:
        terminal.expect("part 1 of ")
        terminal.press("p")
        terminal.expect("demo.py")
        terminal.press("5\n")
        terminal.expect("It is running …")
        terminal.expect("The factor on every peak learning rate", 120)
        assert terminal.shows("It is running …"), "its first table, long before its end"
        fits(terminal, 80, 24)
        terminal.press("s")
        terminal.expect("(Skipped after", 60)
        assert terminal.shows("The number: ")
        terminal.press("q")
    assert terminal.process.returncode == 0
    assert list(tmp_path.glob("runs/present-14*/page.html")), "lesson 14 has no run to wait for"
