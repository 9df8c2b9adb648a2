"""Capstones: a strategy that a learner writes, in the trainer. A sample; benchmarks/capstones.py tries all."""

import json
import subprocess
from pathlib import Path

import pytest

from shardrun.__main__ import main
from shardrun.lesson.course import Lesson, course
from shardrun.lesson.judge import UNSOLVED, Outcome, judge_level
from shardrun.lesson.source import unwritten
from shardrun.lesson.versions import wrong_versions
from shardrun.lesson.wrong import Wrong
from shardrun.own import METHODS, OWN, capstone_of, register
from strategies import catalogue
from strategies.errors import UserError
from tests.ranks import RankPool

LESSONS = [lesson for lesson in course() if lesson.capstone]
FEWEST = 6
"""Wrong versions of a capstone."""


def told(path: str, level: str) -> str:
    """On a rank: what a level of the strategy in a file says against it; empty where it passes."""
    from lessons.capstone import levels

    own = register(Path(path))
    try:
        getattr(levels, level)(own)
    except (Wrong, UserError) as wrong:
        return str(wrong)
    finally:
        del OWN[own.name], catalogue.FOLDERS[own.name]
    return ""


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_the_learners_file_has_the_interface_and_no_body(lesson: Lesson, tmp_path: Path) -> None:
    assert lesson.capstone and {"my_ddp", "my_zero1", "my_zero2", "my_zero3"} >= {lesson.capstone.name}
    path = lesson.folder / lesson.capstone.file
    for method in (*METHODS, "__init__"):
        assert f"    def {method}(" in path.read_text(), method
    assert path.read_text().count("raise NotImplementedError") == len(METHODS) + 1
    like = lesson.capstone.like, lesson.folder
    assert capstone_of(path) == capstone_of(lesson.folder / "by_hand.py") == like
    assert all(level.hints for level in lesson.capstone.levels)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_wrong_versions_are_six_at_least_and_differ(lesson: Lesson) -> None:
    versions = wrong_versions(lesson)
    assert len(versions) >= FEWEST and len({version.text for version in versions}) == len(versions)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_the_solution_is_right_and_a_wrong_version_is_named(lesson: Lesson, ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, told, str(lesson.folder / "by_hand.py"), "right") == ["", "", ""]
    version = next(each for each in wrong_versions(lesson) if each.name == "summed, not averaged")
    path = tmp_path / "my_own.py"
    path.write_text(version.text)
    for words in ranks.run(2, told, str(path), "right"):
        assert version.says in words and "Step 0, reduce: " in words


def version_file(lesson_number: int, name: str, folder: Path) -> tuple[str, str]:
    """A wrong version as a file; its path, and what must be said of it."""
    (lesson,) = (lesson for lesson in LESSONS if lesson.number == lesson_number)
    version = next(each for each in wrong_versions(lesson) if each.name == name)
    path = folder / "my_own.py"
    path.write_text(version.text)
    return str(path), version.says


@pytest.mark.ranks
@pytest.mark.slow
def test_what_nobody_waited_for_is_not_there(ranks: RankPool, tmp_path: Path) -> None:
    """In one machine it is, by chance: the check's network is slow."""
    path, says = version_file(4, "nobody waits", tmp_path)
    for words in ranks.run(2, told, path, "right"):
        assert says in words and "Step 0, wait: " in words


def of_other_sizes() -> str:
    """On a rank: what is said where the second rank's call in a place is of another size than the first's was."""
    import torch
    import torch.distributed as dist

    from lessons.capstone.network import Network, _same_on_all

    rank, network = dist.get_rank(), Network("of other sizes")
    try:
        if not rank:
            _same_on_all(network, "all_reduce", {"tensor": torch.zeros(3)}, "my_own.py, line 7: `x`")
        dist.barrier()
        if rank:
            _same_on_all(network, "all_reduce", {"tensor": torch.zeros(5)}, "my_own.py, line 9: `y`")
    except Wrong as wrong:
        return str(wrong)
    return ""


@pytest.mark.ranks
def test_collectives_that_differ_by_rank_are_named_before_they_hang(ranks: RankPool) -> None:
    first, second = ranks.run(2, of_other_sizes)
    assert not first and second.startswith(
        "rank 0 calls all_reduce of 3 elements (my_own.py, line 7: `x`), and rank 1 calls all_reduce of 5 elements "
    )


def test_what_is_not_begun_is_told_so_without_any_ranks() -> None:
    lesson = LESSONS[0]
    assert lesson.capstone
    outcome = judge_level(lesson, lesson.capstone.levels[0], lesson.folder / lesson.capstone.file, 2)
    assert outcome.status == UNSOLVED and "Begin with __init__" in outcome.message
    assert set(unwritten(lesson.folder / lesson.capstone.file)) == {"__init__", *METHODS}
    assert not unwritten(lesson.folder / "by_hand.py")


def half(path: str) -> str:
    """On a rank: what is known of a strategy that ends in the middle."""
    from lessons.capstone import levels

    own = register(Path(path))
    try:
        levels.right(own)
    except NotImplementedError as error:
        return " ".join(error.__notes__)
    finally:
        del OWN[own.name], catalogue.FOLDERS[own.name]
    return ""


@pytest.mark.ranks
@pytest.mark.slow
def test_what_is_written_is_checked_before_all_is(ranks: RankPool, tmp_path: Path) -> None:
    text = (LESSONS[0].folder / "by_hand.py").read_text()
    norm = '"""Every rank has all gradients: nothing to send."""\n'
    assert text.count(norm) == 1
    path = tmp_path / "my_own.py"
    path.write_text(text.replace(norm, f"{norm}        raise NotImplementedError\n"))
    assert ranks.run(2, half, str(path)) == ["The mean gradients of the first step are right."] * 2


@pytest.mark.ranks
@pytest.mark.slow
def test_bytes_and_overlap_are_graded(ranks: RankPool, tmp_path: Path) -> None:
    """Of ZeRO-2, and a version that waits at once; no leak, in 50 steps of the trainer."""
    (lesson,) = (lesson for lesson in LESSONS if lesson.number == 6)
    solution = str(lesson.folder / "by_hand.py")
    assert ranks.run(2, told, solution, "frugal") == ["", ""]
    path, says = version_file(6, "a reduction blocks backward", tmp_path)
    assert all(says in words for words in ranks.run(2, told, path, "overlapped"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lesson_verb(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["lesson", *arguments])
    return int(end.value.code or 0)


def test_levels_are_checked_in_order_kept_over_days_and_the_solution_comes_last(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passing: set[str] = set()
    asked: list[tuple[str, int]] = []

    def judge(lesson: Lesson, level: object, attempt: Path, ranks: int) -> Outcome:
        name = level.name.partition(".")[2]  # type: ignore[attr-defined]
        asked.append((name, ranks))
        return Outcome("passed") if name in passing else Outcome("wrong", "Step 0, reduce: no.")

    monkeypatch.setattr("shardrun.lesson.judge.judge_level", judge)
    assert lesson_verb("start", "4") == 0
    passing |= {"right"}
    assert lesson_verb("check", "4", "my_ddp") == 1
    assert asked == [("right", 2), ("right", 3), ("frugal", 2)]
    printed = capsys.readouterr().out
    assert "With 2 ranks: Step 0, reduce: no." in printed and "1 of 4 levels" in printed
    assert lesson_verb("solution", "4", "my_ddp") == 2
    assert "1 of 4 levels are" in capsys.readouterr().err
    assert lesson_verb("hint", "4", "my_ddp") == 0
    assert "my_ddp.frugal" in capsys.readouterr().out
    passing |= {"frugal", "overlapped", "muon"}
    assert lesson_verb("check", "4", "my_ddp") == 0
    passing.discard("right")
    assert lesson_verb("check", "4", "my_ddp") == 1  # solved stays solved
    assert "now failing" in capsys.readouterr().out
    assert lesson_verb("solution", "4", "my_ddp") == 0
    assert "class HandDDP" in capsys.readouterr().out
    levels = json.loads((here / "learning/progress.json").read_text())["solved"]["04_ddp"]
    assert levels == [f"my_ddp.{name}" for name in ("right", "frugal", "overlapped", "muon")]


def test_a_file_that_is_no_strategy_is_refused_in_a_sentence(here: Path) -> None:
    path = here / "mine.py"
    with pytest.raises(UserError, match="there is no file mine.py"):
        register(Path("mine.py"))
    path.write_text("class Mine:\n    pass\n")
    with pytest.raises(UserError, match="give it a line LIKE"):
        register(path)
    path.write_text('LIKE = "ddp"\n\n\nclass Mine:\n    pass\n')
    with pytest.raises(UserError, match="has no classes with the methods backward, wait"):
        register(path)
    named = here / "ddp.py"
    named.write_text('LIKE = "ddp"\n')
    with pytest.raises(UserError, match="ddp is one of the catalogue's"):
        register(named)


@pytest.mark.ranks
@pytest.mark.slow
def test_it_is_compared_beside_the_librarys(here: Path, warm_python: str) -> None:
    (lesson,) = (lesson for lesson in LESSONS if lesson.number == 4)
    mine = here / "my_ddp.py"
    mine.write_text((lesson.folder / "by_hand.py").read_text())
    small = ["--data.global-batch", "4", "--data.eval-tokens", "256", "--untimed-steps", "0"]
    arguments = ["--strategies", "ddp", "--with", str(mine), "--steps", "3", "--json", "--", *small]
    done = subprocess.run(
        [warm_python, "-m", "shardrun", "compare", *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    library, own = json.loads(done.stdout)["runs"]
    assert (library["strategy"], own["strategy"]) == ("ddp", "my_ddp")
    assert own["losses"] == pytest.approx(library["losses"], rel=1e-4)
    assert own["ring_bytes"] == pytest.approx(library["ring_bytes"], rel=0.01)
