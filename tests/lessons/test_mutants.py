"""Mutants of a solution: at every site one thing is another, and the file is one that can be imported."""

from pathlib import Path

from benchmarks import lesson_mutants as benchmark
from shardrun.lesson.course import course, find_lesson
from shardrun.lesson.mutants import chosen, equal_ones, mutants, sample

SOLUTION = '''
def _half(x):
    return x // 2


def first(rows, *, turn=False):
    """2 + 2 in a docstring is no site."""
    if len(rows) > 3:
        raise ValueError(f"{1 + 1} rows")
    total = rows[1:] if turn else rows[:-1]
    return [_half(a) + b for a, b in zip(total, total, strict=True)]


def second(x):
    return _half(x) * 3
'''


def test_every_site_is_changed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "solution.py"
    path.write_text(SOLUTION)
    found = {mutant.change for mutant in mutants(path, "first")}
    for change in (
        "len(rows) > 3 → len(rows) >= 3",
        "len(rows) > 3 → len(rows) > 4",
        "x // 2 → x / 2",
        "x // 2 → x // 3",
        "rows[1:] → rows[:]",
        "_half(a) + b → _half(a) - b",
    ):
        assert change in found, (change, sorted(found))
    assert not any(change.startswith("1 + 1") for change in found)
    assert "zip(total, total, strict=True) → zip(total, total)" not in found
    texts = [mutant.text for mutant in mutants(path, "first")]
    assert len(set(texts)) == len(texts) > 20
    assert all(compile(text, "mutant", "exec") for text in texts)
    # what `first` uses too is judged with it
    assert {m.change for m in mutants(path, "second")} >= {"_half(x) * 3 → _half(x) / 3", "_half(x) * 3 → 3"}
    assert not any("// 2" in m.change for m in mutants(path, "second"))


def test_the_number_of_ranks_is_written_down(tmp_path: Path) -> None:
    path = tmp_path / "solution.py"
    path.write_text("def mine(rows):\n    return rows.chunk(dist.get_world_size())[dist.get_rank()]\n")
    found = {mutant.change for mutant in mutants(path, "mine")}
    assert found >= {f"dist.get_world_size() → {n}" for n in (2, 3)} | {"dist.get_rank() → 0"}


def test_every_site_has_its_turn(tmp_path: Path) -> None:
    path = tmp_path / "solution.py"
    path.write_text(SOLUTION)
    every = mutants(path, "first")
    sites = {mutant.site for mutant in every}
    assert len(sites) < len(every)
    for most in (1, len(sites), len(sites) + 1, len(every) - 1, len(every), 1000):
        taken = chosen(every, most)
        assert {mutant.site for mutant in taken} == sites
        assert len(taken) == min(len(every), max(most, len(sites)))
        assert taken == sorted(taken, key=every.index)


def test_the_table_is_of_the_present_solutions_and_explains_each_survivor() -> None:
    rows, text = benchmark.read(benchmark.TABLE), benchmark.TABLE.read_text(encoding="utf-8")
    for (number, name), found in rows.items():
        lesson = find_lesson(number)
        now = benchmark.row(benchmark.tried_of(lesson, lesson.exercise(name)))
        assert (found.sites, found.mutants) == (now.sites, now.mutants), f"judge lesson {number}'s {name} again"
    assert text == benchmark.report(rows) and benchmark.MISSING not in text


def test_a_sample_is_spread_evenly() -> None:
    assert sample(list("abcdefgh"), 4) == list("aceg") and sample(list("ab"), 4) == ["a", "b"]


def test_what_is_called_equal_is_a_mutant() -> None:
    for lesson in course():
        for name, reasons in equal_ones(lesson.folder).items():
            there = {mutant.change for mutant in mutants(lesson.folder / "solution.py", lesson.exercise(name).name)}
            assert set(reasons) <= there, (lesson.name, name, set(reasons) - there)
            assert all(reasons.values())


def test_every_exercise_has_mutants() -> None:
    """Also one whose name is a parameter of an earlier one."""
    without = [
        f"{lesson.name}/{exercise.name}"
        for lesson in course()
        for exercise in lesson.exercises
        if not mutants(lesson.folder / "solution.py", exercise.name)
    ]
    assert without == []
