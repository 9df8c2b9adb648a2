"""Guess first: asked where somebody can answer, kept, and compared with what the demo found."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardrun.lesson import guess as guessing
from shardrun.lesson.course import course, find_lesson
from shardrun.lesson.guess import KEPT, SHOWN, Challenge, compared, guess_first, last_guess, parsed, worded
from shardrun.present.notes import GENERAL

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("guess", "number", "words"),
    [
        (1.75, 1.75, "which is it"),
        (1.75, 1.751, "as good as it"),
        (2.0, 1.75, "14% too much"),
        (1.0, 1.75, "43% too little"),
        (3.5, 1.75, "2 times as much"),
        (0.5, 2.0, "4 times too little"),
        (-1.0, 2.0, "3 off"),
        (3.0, 0.0, "3 off"),
        (0.0, 2.0, "2 off"),
    ],
)
def test_a_guess_is_compared(guess: float, number: float, words: str) -> None:
    assert compared(guess, number, "MiB").startswith(f"Your guess: {guessing.written(guess)} MiB")
    assert words in compared(guess, number, "MiB")


@pytest.mark.parametrize(
    ("text", "number"), [("1,5", 1.5), (" 2 ", 2.0), ("", None), ("two", None), ("inf", None), ("nan", None)]
)
def test_what_is_typed_is_a_number_or_none(text: str, number: float | None) -> None:
    assert parsed(text) == number


def test_every_lesson_asks_and_has_notes_for_parts_that_there_are() -> None:
    for lesson in course():
        assert lesson.guess and lesson.guess.question.endswith("?"), lesson.name
        assert "{" not in worded(lesson.guess, 2) + lesson.guess.unit + lesson.guess.why
        assert {"model", "demo"} <= set(lesson.notes) <= set(GENERAL), lesson.name
        assert ("training" in lesson.notes) == bool(lesson.live.config), lesson.name
        demo = (lesson.folder / "demo.py").read_text(encoding="utf-8")
        assert f"guess_first({lesson.number})" in demo and "guess.tell(" in demo, lesson.name


def test_the_question_is_about_as_many_ranks_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    asked = guess_first(5)
    assert "rank 0 of 4 " in asked.question and asked.ranks == 4
    monkeypatch.setenv("RANK", "3")
    assert guess_first(5).silent
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert guess_first(5).ranks == 2


def test_a_guess_from_the_command_line_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "3.5"])
    asked = guess_first(5)
    asked.tell(1.751)
    printed = capsys.readouterr().out
    assert float(SHOWN.search(printed)[1]) == 1.751  # type: ignore[index]
    assert "Guess first: AdamW's states" in printed and "2 times as much" in printed
    (line,) = (json.loads(line) for line in KEPT.read_text().splitlines())
    assert (line["lesson"], line["guess"], line["number"], line["unit"]) == (5, 3.5, 1.751, "MiB")
    assert last_guess(5, asked.question) == 3.5 and last_guess(4, asked.question) is None


def test_a_rank_that_is_not_the_first_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    guess = find_lesson(5).guess
    assert guess
    Challenge(5, guess, guess.question, 2, silent=True).tell(1.0)
    assert not capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are Unix's")
def test_somebody_at_a_terminal_is_asked_and_the_last_guess_is_told(tmp_path: Path) -> None:
    code = "from shardrun.lesson.guess import guess_first; guess_first(15).tell(253)"
    for earlier in (False, True):
        master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdin=slave, stdout=slave, stderr=slave
        ) as process:
            os.close(slave)
            os.write(master, b"254\n")
            process.wait(60)
            seen = re.sub(r"\s+", " ", os.read(master, 1 << 16).decode())
        os.close(master)
        assert "numbers, or Enter alone: " in seen and "The number: 253 numbers" in seen
        assert "Your guess: 254 numbers, which is as good as it." in seen
        assert ("(Last time you guessed 254.)" in seen) == earlier
