"""What a learner is told: whose mistake it was, once, and every known mistake that a number can stand for."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lessons import checking
from shardrun.__main__ import main
from shardrun.by_path import import_file
from shardrun.lesson import called, rank
from shardrun.lesson.course import Exercise, Lesson, course, find_lesson
from shardrun.lesson.folder import Folder, open_folder
from shardrun.lesson.judge import Outcome
from shardrun.lesson.source import parameters
from shardrun.lesson.wrong import Wrong


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an attempt's own process begins with."""
    monkeypatch.setattr(called, "CALLS", called.Calls())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    modules = dict(sys.modules)
    with warnings.catch_warnings():
        yield
    for name in ("exercise", "check", "other"):
        if name not in modules:
            sys.modules.pop(name, None)


CHECK = """
from lessons.checking import Wrong, on_behalf
def double(theirs):
    found = theirs([1, 2])
    if len(found) != 2:
        raise Wrong("two are asked for")
    if found[0] + found[1] != 6:
        raise Wrong("doubled")
"""

ATTEMPTS = {
    "right": ("def double(x):\n    return [2 * e for e in x]", "passed", ""),
    "the line of the exercise": ("def double(x):\n    raise NotImplementedError", "unsolved", ""),
    "a helper not begun": (
        "def help(x):\n    raise NotImplementedError\ndef double(x):\n    return help(x)", "unsolved", "",
    ),
    "with a text": ("def double(x):\n    raise NotImplementedError('later')", "error", "NotImplementedError: later"),
    "of a library": (
        "import torch\ndef double(x):\n    return torch.zeros(2).to(torch.float8_e4m3fn).max()",
        "error", "line 3, `return torch.zeros(2).to(torch.float8_e4m3fn).max()` raised NotImplementedError",
    ),
    "an error": ("def double(x):\n    return x[5]", "error", "IndexError: list index out of range (given: x = [1, 2])"),
    "too few parameters": ("def double():\n    return 1", "error", "Calling double raised TypeError"),
    "the check breaks": (
        "def double(x):\n    return [2, None]", "broken",
        "The check itself broke, this is not your mistake: TypeError",
    ),
    "changed, and right": ("def double(x):\n    x.reverse()\n    return [2, 4]", "wrong", "changed `x`"),
    "changed, and wrong": ("def double(x):\n    x.reverse()\n    return [2]", "wrong", "asked for\nYour function"),
    "changed, and the check breaks": ("def double(x):\n    x.reverse()\n    return [2, None]", "wrong", "changed `x`"),
    "a syntax error": ("def double(x):\n    return [2 *", "unreadable", "exercise.py, line 2: `return [2 *`: "),
    "a name at the top": ("import torch\nx = nothing", "unreadable", "line 2, `x = nothing` raised NameError"),
    "renamed": ("def doubled(x):\n    return x", "wrong", "its name must stay"),
}  # fmt: skip


@pytest.mark.parametrize("what", ATTEMPTS)
def test_whose_mistake_it_was(what: str, tmp_path: Path) -> None:
    text, status, words = ATTEMPTS[what]
    (tmp_path / "exercise.py").write_text(text + "\n")
    (tmp_path / "check.py").write_text(CHECK)
    job = rank.Job("double", tmp_path / "exercise.py", tmp_path / "check.py", 1, parameters=("x",))
    found = rank._answer(job)
    assert found[0] == status and words in found[1], found


def test_warnings_are_not_shown(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Of a library: nothing that the learner could act on, and as often as it is called."""
    attempt = (
        "import warnings\ndef double(x):\n    warnings.warn('old', FutureWarning)\n    return [2 * e for e in x]\n"
    )
    (tmp_path / "exercise.py").write_text(attempt)
    (tmp_path / "check.py").write_text(CHECK)
    assert rank._answer(rank.Job("double", tmp_path / "exercise.py", tmp_path / "check.py", 1))[0] == "passed"
    assert not recwarn.list


def judged(outcomes: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `check` find these outcomes, by exercise; "" for all others."""
    monkeypatch.setattr("shardrun.lesson.judge.judge", lambda lesson, exercise, attempt: outcomes[exercise.name])


def lesson(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["lesson", *arguments])
    return int(end.value.code or 0)


def test_a_file_that_cannot_be_read_is_said_once_and_takes_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = find_lesson(1)
    lesson("start", "1")
    judged({e.name: Outcome("passed") for e in first.exercises}, monkeypatch)
    assert lesson("check", "1") == 0
    judged({e.name: Outcome("unreadable", "exercise.py, line 2: oh") for e in first.exercises}, monkeypatch)
    capsys.readouterr()
    assert lesson("check", "1") == 1
    printed = capsys.readouterr().out
    assert printed.count("exercise.py, line 2: oh") == 1 and "5 of 5 solved" in printed


def test_solved_stays_solved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = find_lesson(1)
    names = [e.name for e in first.exercises]
    lesson("start", "1")
    judged({name: Outcome("passed") for name in names}, monkeypatch)
    assert lesson("check", "1") == 0
    judged({name: Outcome("wrong" if name == names[0] else "passed", "no") for name in names}, monkeypatch)
    capsys.readouterr()
    assert lesson("check", "1") == 1
    day = open_folder().solved_on[f"{first.name}/{names[0]}"]
    assert f"(solved on {day}, now failing)" in capsys.readouterr().out
    lesson("progress")
    printed = capsys.readouterr().out
    assert f"{names[0]}: solved on {day}, now failing" in printed and "5 of " in printed
    judged({name: Outcome("broken", "mine") for name in names}, monkeypatch)
    lesson("check", "1")
    assert open_folder().failing == [f"{first.name}/{names[0]}"]
    judged({name: Outcome("passed") for name in names}, monkeypatch)
    assert lesson("check", "1") == 0 and open_folder().failing == []


def test_progress_of_before_is_read(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text('{"schema": 1, "current": 1, "solved": {"01_one_gpu": ["training_bytes"]}}')
    folder, first = open_folder(tmp_path), find_lesson(1)
    folder.mark(first, first.exercise("training_bytes"), False)
    assert folder.solved_in(first) and folder.fails_now(first, first.exercise("training_bytes"))
    assert isinstance(folder, Folder) and folder.day_solved(first, first.exercise("training_bytes")) == ""


EXPECT_NUMBER = checking.expect_number


def numbers_of(lesson: Lesson, exercise: Exercise, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every number that a check asks for, with the mistakes that it knows, as its solution goes through it."""
    asked: list[tuple[Any, ...]] = []

    def listen(found: Any, right: Any, what: str, mistakes: Any = None, ranks: Any = None) -> None:
        asked.append((right, what, mistakes or {}, ranks))
        EXPECT_NUMBER(found, right, what, mistakes, ranks)

    monkeypatch.setattr(checking, "expect_number", listen)
    solution = import_file(lesson.folder / "solution.py", "exercise")
    names = parameters(lesson.folder / "solution.py", exercise.name)
    function = called.watched(getattr(solution, exercise.name), names, exercise.changes)
    getattr(import_file(lesson.folder / "check.py", "check"), exercise.name)(function)
    return asked


@pytest.mark.parametrize("number", [each.number for each in course()])
def test_every_mistake_that_gives_a_number_is_named(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two known mistakes may give one value: then the message names both."""
    each = find_lesson(number)
    for exercise in each.exercises:
        if not exercise.accounting:
            continue
        for right, what, mistakes, ranks in numbers_of(each, exercise, monkeypatch):
            for value in mistakes.values():
                if value < 0 or checking._close(value, right):
                    continue
                due = [text for text, other in mistakes.items() if checking._close(other, value)]
                with pytest.raises(Wrong) as told:
                    EXPECT_NUMBER(value, right, what, mistakes, ranks)
                assert all(text in str(told.value) for text in due), (exercise.name, what, value, str(told.value))


@pytest.mark.parametrize("found", [512, 512.0, np.int64(512), np.float32(512), 512 * (1 + 1e-12)], ids=repr)
def test_a_number_is_a_number_whatever_its_type(found: Any) -> None:
    checking.expect_number(found, 512.0, "a number")
    assert checking.is_whole(found) == (type(found) in (int, np.int64))


@pytest.mark.parametrize("found", [True, np.True_, "512", None, torch.tensor(512), [512]], ids=repr)
def test_what_is_no_number(found: Any) -> None:
    with pytest.raises(Wrong, match="a plain number is asked for|Is the return missing"):
        checking.expect_number(found, 512.0, "a number")


def test_no_term_is_too_small() -> None:
    """AdamW's step counter beside gigabytes; a weight decay beside weights."""
    with pytest.raises(Wrong):
        checking.expect_number(8 * 10**8 + 4, 8 * 10**8, "a number")
    right = torch.linspace(-3, 5, 40)
    assert checking.rounded_alike(right / 3 * 3, right) and checking.rounded_alike(right.double(), right.double())
    assert not checking.rounded_alike(right * (1 - 1e-5), right)
    assert checking.rounded_alike(torch.full((2,), 1e-6), torch.zeros(2), size=1.0)
    assert not checking.rounded_alike(torch.full((2,), 1e-9), torch.zeros(2))
    assert not checking.rounded_alike(right * float("nan"), right) and checking.rounded_alike(right[:0], right[:0])


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8, 16, 64])
def test_a_factor_of_ranks_is_never_told_as_one_of_units_alone(ranks: int) -> None:
    for factor in (ranks, 1 / ranks):
        with pytest.raises(Wrong, match=f"of all {ranks} ranks|divided by the ranks once"):
            checking.expect_number(3e9 * factor, 3e9, "a number", {}, ranks)


def test_the_arguments_that_may_change_are_declared_where_the_docstring_says_in_place() -> None:
    import ast

    for each in course():
        tree = ast.parse((each.folder / "exercise.py").read_text(encoding="utf-8"))
        text = {node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.FunctionDef)}
        for exercise in each.exercises:
            names = parameters(each.folder / "solution.py", exercise.name)
            assert set(exercise.changes) <= set(names), (each.name, exercise.name)
            if "in place" in text[exercise.name]:
                assert exercise.changes, f"{each.name}/{exercise.name} works in place: which arguments?"
