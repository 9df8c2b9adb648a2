"""Figures in the lessons' README files that a program can compute."""

import re
from pathlib import Path

from lessons.compared import load_beside
from shardrun.lesson.course import find_lesson
from speedrun.books.activations import predict_activations
from speedrun.run.record import SOURCES

ROOT = Path(__file__).parents[2]


def readme(number: int) -> str:
    return " ".join((find_lesson(number).folder / "README.md").read_text(encoding="utf-8").split())


def test_a_record_has_as_many_lines_as_lesson_17_says() -> None:
    files = [path for package in SOURCES for path in (ROOT / package).rglob("*.py")]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    said = re.search(r"\*The record\*: about ([\d,]+) lines", readme(17))
    assert said and abs(int(said[1].replace(",", "")) / lines - 1) < 0.1, lines


def test_relu_and_its_square_are_as_much_as_lesson_10_says() -> None:
    demo = load_beside(str(find_lesson(10).folder / "demo.py"), "demo")
    kept = predict_activations(demo.MODEL.model, 8, demo.MODEL.data.sequence_length, "fp32")
    parts = kept.by_part()
    assert "ReLU's output and its square are kept, 4 times as wide as the stream. They are two fifths" in readme(10)
    assert abs((parts["activation"] + parts["mlp down"]) / kept.total - 2 / 5) < 0.02, parts


def test_lesson_14_trains_as_often_as_it_says() -> None:
    demo = load_beside(str(find_lesson(14).folder / "demo.py"), "demo")
    runs = len(demo.SCHEDULES) * (len(demo.RATES) + len(demo.SEEDS) - 1)
    assert f"trains `tiny` {({16: 'sixteen'})[runs]} times for fifty steps" in readme(14)
