"""The table on the front page is as `shardrun compare` prints it."""

import re
from pathlib import Path

import pytest

from shardrun import compare
from strategies import catalogue
from strategies.ledger.terms import CATEGORIES

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
MIB = 2**20


def shown() -> list[str]:
    """The front page's block with the table: its lines."""
    blocks = re.findall(r"^```\n(.*?)^```$", README, re.M | re.S)
    return next(block.splitlines() for block in blocks if block.startswith("strategy "))


def run_of(line: str) -> compare.ComparedRun:
    """A run with the figures of a line; what rounding has left of its total is shared out."""
    name, *cells = line.split()
    figures = [0.0 if cell == "–" else float(cell) for cell in cells]
    held, total, peak, loss, ms = figures[: len(CATEGORIES)], *figures[len(CATEGORIES) :]
    rest = (total - sum(held)) / sum(map(bool, held))
    memory = {}
    for category, figure in zip(CATEGORIES, held, strict=True):
        size = round((figure + rest) * MIB) if figure else 0
        memory[category] = {"predicted": size, "measured": size, "remainder": 0}
    return compare.ComparedRun(
        strategy=name, folder=Path(), losses=[loss], val_loss=loss, step_ms=ms, memory=memory, host={}, activations={},
        peak={"predicted": None, "measured": round(peak * MIB), "remainder": None}, predicted_for={}, traffic=[],
        remainders=[],
    )  # fmt: skip


def test_the_front_pages_table_is_what_compare_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its headings, its columns, its strategies and the sentence below it."""
    monkeypatch.setenv("COLUMNS", "100")
    lines = shown()
    runs = [run_of(line) for line in lines[2 : lines.index("")]]
    assert [run.strategy for run in runs] == list(catalogue.spread())
    compare._print_books(runs, 2)
    printed = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    start = printed.index(lines[0])
    assert printed[start:] == lines
