"""Lesson 16's zoo: its threads against real ranks, its books against the formula, and no animal without a killer."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.ranks import RankPool

LESSON = Path(__file__).parent.parent.parent / "lessons" / "16_bug_zoo"
FILES = ("ranks", "zoo", "animals", "check", "solution")


def load(name: str) -> ModuleType:
    """A file of the lesson; they import each other by their bare names, as in a learner's folder."""
    if str(LESSON) not in sys.path:
        sys.path.insert(0, str(LESSON))
    spec = importlib.util.spec_from_file_location(name, LESSON / f"{name}.py")
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lesson() -> Iterator[dict[str, ModuleType]]:
    """The lesson's files by name; their bare names are taken back afterwards."""
    yield {name: load(name) for name in FILES}
    sys.path.remove(str(LESSON))
    for name in FILES:
        del sys.modules[name]


def test_every_animal_is_killed_by_a_test_of_the_solution(lesson: dict[str, ModuleType]) -> None:
    """Each by the tests that are for it (check.py runs them), and healthy ones on four ranks live."""
    check, zoo, solution = lesson["check"], lesson["zoo"], lesson["solution"]
    animals = lesson["animals"].ANIMALS
    assert {animal for killed in check.KILLS.values() for animal in killed} == set(animals)
    assert solution.diagnose() == check.ANSWERS and set(check.ANSWERS.values()) == set(zoo.DIAGNOSES)
    for name in check.KILLS:
        getattr(check, name)(getattr(solution, name))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_sent_is_what_the_exercise_computes(lesson: dict[str, ModuleType], ranks: int) -> None:
    embedding, inner = 64 * 32, 2 * 64 * 32
    for report in lesson["zoo"].run(ranks=ranks, accumulation=1, steps=1):
        assert report.sent == lesson["solution"].step_bytes(embedding, inner, ranks)


def on_rank(animal: str) -> Any:
    modules = {name: load(name) for name in FILES[:3]}
    kinds = {"healthy": modules["zoo"].Trainer, **modules["animals"].ANIMALS}
    report = kinds[animal](modules["ranks"].Launched(), 2, 0, torch.device("cpu")).train(6)
    return vars(report)


@pytest.mark.ranks
def test_processes_do_what_threads_do(ranks: RankPool, lesson: dict[str, ModuleType]) -> None:
    for animal, stuck in (("healthy", ""), ("ibis", "step 5: rank 0 is at all_reduce of the validation loss")):
        kind = lesson["animals"].ANIMALS.get(animal, lesson["zoo"].Trainer)
        for threads, found in zip(lesson["zoo"].run(kind, steps=6), ranks.run(2, on_rank, animal), strict=True):
            assert found["stuck"] == threads.stuck and found["stuck"].startswith(stuck)
            assert found["sent"] == threads.sent and found["rows"] == threads.rows
            for curve in ("losses", "grad_norms", "val_losses"):  # weights alone would not tell a factor
                assert found[curve] == pytest.approx(getattr(threads, curve), rel=1e-5)
            for name, weight in threads.weights[-1].items():
                torch.testing.assert_close(found["weights"][-1][name], weight, atol=1e-5, rtol=1e-5)
