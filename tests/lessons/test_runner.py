"""`shardrun lesson`: the learner's folder, what is told about numbers, and checks on ranks, hangs included."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lessons.checking import GB, GIB, Wrong, expect_number, expect_numbers
from lessons.kit import eval_tokens, steps
from shardrun.__main__ import main
from shardrun.launch import shipped_names
from shardrun.lesson import show
from shardrun.lesson.course import course, find_lesson
from shardrun.lesson.folder import open_folder
from shardrun.lesson.judge import _processor_seconds, describe
from shardrun.lesson.rank import Job
from shardrun.lesson.source import commands, function_source, wrong_attempts
from speedrun.run.command_line import parse

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lesson(*arguments: str) -> int:
    """The verb's exit status, in this process."""
    with pytest.raises(SystemExit) as end:
        main(["lesson", *arguments])
    return int(end.value.code or 0)


def in_a_process(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The verb where it starts ranks: with a fork server of its own, in a Python as a learner's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-m", "shardrun", "lesson", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=200)


def test_start_copies_and_never_overwrites(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lesson("start", "4") == 0
    folder = here / "learning" / "04_ddp"
    assert {path.name for path in folder.iterdir()} == {"README.md", "my_ddp.py", "demo.py", "exercise.py"}
    assert (here / "learning/accelerate_configs/cpu/ddp.yaml").is_file()
    (folder / "exercise.py").write_text("mine")
    (folder / "demo.py").unlink()
    assert lesson("start", "4") == 0
    assert (folder / "exercise.py").read_text() == "mine"
    assert (folder / "demo.py").is_file()
    printed = capsys.readouterr().out
    assert "builds on lesson 1, One GPU: 0 of 5 solved" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_reset_keeps_what_the_learner_wrote(here: Path) -> None:
    lesson("start", "1")
    attempt = here / "learning/01_one_gpu/exercise.py"
    for number in (1, 2):
        attempt.write_text(f"attempt {number}")
        assert lesson("reset") == 0
        assert attempt.with_name(f"exercise.{number}.py").read_text() == f"attempt {number}"
        assert attempt.read_text() == (find_lesson(1).folder / "exercise.py").read_text()


def test_hints_come_one_by_one_and_progress_remembers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lesson("start", "3")
    capsys.readouterr()
    lesson("hint")
    first = capsys.readouterr().out
    lesson("hint")
    second = capsys.readouterr().out
    hints = find_lesson(3).exercises[0].hints
    assert hints[1][:30] not in first
    assert hints[0][:30] in second and hints[1][:30] in second
    assert lesson("progress", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    third = next(entry for entry in told["lessons"] if entry["number"] == 3)
    assert told["current"] == 3 and third["started"]
    assert third["exercises"][0]["hints_shown"] == 2


def test_the_folder_is_found_from_inside_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lesson("start", "1")
    monkeypatch.chdir(here / "learning" / "01_one_gpu")
    assert open_folder().path.resolve() == (here / "learning").resolve()


def test_solution_shows_a_function_with_its_helpers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lesson("solution", "3", "all_to_all") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("def _exchange(") and "def all_to_all(" in shown and "def all_gather(" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("start", "99"), "there is no lesson 99; there are 1, 2"),
        (("check",), "no lesson has been started here; begin with: shardrun lesson start 1"),
        (("check", "2"), "does not exist; begin with: shardrun lesson start 2"),
        (("hint", "1", "nothing"), "lesson 1 has no exercise 'nothing'; it has training_bytes"),
    ],
)
def test_mistakes_get_a_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert lesson(*arguments) == 2
    assert words in capsys.readouterr().err


def test_a_spoilt_progress_file_is_named_and_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lesson("start", "1")
    state = here / "learning/progress.json"
    state.write_text("{")
    assert lesson("list") == 2
    assert "progress.json cannot be read" in capsys.readouterr().err
    assert state.read_text() == "{"


def test_list_fits_the_terminal_and_loads_no_torch(here: Path) -> None:
    code = "import sys; from shardrun.__main__ import main\ntry: main(['lesson', 'list'])\nexcept SystemExit: pass\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"],
        cwd=here, env=environment, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100
    assert "Next: shardrun lesson start 1" in done.stdout


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "Is the return missing"),
        ("512", "a plain number"),
        (True, "a plain number"),
        (1024e9, "twice as much"),
        (256e9, "no moments"),
        (512e9 * GB / GIB, "GiB"),
        (512e9 * 8, "bits"),
        (1.3e12, "too large, and no mistake that is known"),
        (float("nan"), r"is not a number \(nan\)"),
        (float("inf"), "is infinite, or as good as that"),
        (float("-inf"), "is infinite"),
        (10**400, "is infinite, or as good as that"),
        ([0] * 10**6, "returned .0, 0, 0, 0, 0, 0, .... for a model, in bytes; a plain number"),
    ],
)
def test_numbers_are_told_apart(found: object, words: str) -> None:
    with pytest.raises(Wrong, match=words):
        expect_number(found, 512e9, "a model, in bytes", {"no moments": 256e9})


PRINTS = """
import os, sys
from shardrun.lesson.rank import Bounded
print("before")
with Bounded():
    {what}
print("after")
"""


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("print('x' * 3_000_000)", 10_000),
        ("[print(number) for number in range(100_000)]", 290),
        ("[print('error', file=sys.stderr) for _ in range(100_000)]", 600),
        ("os.write(1, b'y' * 200_000); sys.stdout.buffer.write(b'z' * 200_000)", 10_000),
        ("os.system('yes | head -c 100000')", 200),
        ("print('little')", 7),
    ],
)
def test_what_an_attempt_prints_is_shown_up_to_a_bound(what: str, shown: int) -> None:
    code = PRINTS.format(what=what)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1], done.stderr) == ("before", "after", "")
    said = [line for line in lines if "left out" in line]
    assert len(said) == (what != "print('little')") and abs(len(done.stdout) - shown - 13) < 70


def test_right_numbers_pass() -> None:
    expect_number(512 * 10**9, 512e9, "a model")
    expect_numbers({"a": 1, "b": 2.0}, {"a": 1, "b": 2}, "two", {})
    with pytest.raises(Wrong, match="no entry 'b'"):
        expect_numbers({"a": 1}, {"a": 1, "b": 2}, "two", {})


@pytest.mark.parametrize("number", [each.number for each in course()])
def test_what_a_check_ends_with_fits_and_says_what_comes_next(
    here: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    each = find_lesson(number)
    lesson("start", str(number))
    folder = open_folder()
    for exercise in each.exercises:
        show.after_check(each, folder, course())
        folder.mark(each, exercise, True)
    folder.save()
    show.after_check(each, folder, course())
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for exercise in each.exercises:
        assert f"Next: {exercise.name} (a hint: shardrun lesson hint {number} {exercise.name})" in printed
    assert f"Lesson {number} is done. Next: shardrun lesson start " in printed
    assert lesson("hint") == 2 and f"name the one you mean: {each.exercises[0].name}, " in capsys.readouterr().err


def test_every_lesson_is_described() -> None:
    """What `verify` needs at least; test_verify.py runs it."""
    for each in course():
        wrong = wrong_attempts(each.folder / "wrong.py")
        assert all(len(wrong[exercise.name]) >= 2 for exercise in each.exercises), each.name
        assert any(exercise.accounting for exercise in each.exercises)
        assert all(function_source(each.folder / "solution.py", exercise.name) for exercise in each.exercises)
        assert any(command.gpu for command in commands(each.folder / "README.md"))
        assert all(number < each.number for number in each.prerequisites)
        configs = [config for config in (each.live.demo, each.live.config) if config]
        assert set(configs) <= set(shipped_names()) and bool(each.live.arguments) == bool(each.live.config)
        if each.live.arguments:  # of `shardrun present`: something to watch, in a minute or two
            assert 60 <= parse(list(each.live.arguments))[1].steps <= 500


def test_a_demo_trains_as_many_steps_as_it_wants_unless_tests_set_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDRUN_LESSON_STEPS", raising=False)
    assert steps(40) == 40 and eval_tokens(16_384) == 16_384
    monkeypatch.setenv("SHARDRUN_LESSON_STEPS", "5")
    assert (steps(40), steps(3)) == (5, 3)
    assert (eval_tokens(16_384), eval_tokens(2048)) == (5 * 1024, 2048)
    for wrong in ("0", "few", "-1"):
        monkeypatch.setenv("SHARDRUN_LESSON_STEPS", wrong)
        with pytest.raises(ValueError, match=f"SHARDRUN_LESSON_STEPS is '{wrong}'; set it to a number of steps from 1"):
            steps(40)


@pytest.mark.skipif(sys.platform != "linux", reason="states of processes")
def test_a_rank_that_gets_no_processor_on_a_busy_machine_is_no_hang() -> None:
    """It stands in the queue; who waits for another rank does not."""
    for program, queues in (("while :; do :; done", True), ("sleep 60", False)):
        process = subprocess.Popen(["sh", "-c", f"exec {program}" if program.startswith("sleep") else program])
        try:
            time.sleep(0.5)
            assert _processor_seconds([(process, None)])[1] == queues, program  # type: ignore[list-item]
        finally:
            process.kill()
            process.wait()


def test_stacks_become_words(tmp_path: Path) -> None:
    attempt = tmp_path / "exercise.py"
    attempt.write_text("a\nb\n    dist.send(x, 1)\n")
    stacks = (
        'Thread 0x1 (most recent call first):\n  File "/lib/socket.py", line 5 in read\n\n'
        "Current thread 0x2 (most recent call first):\n"
        '  File "/torch/distributed/distributed_c10d.py", line 9 in send\n'
        f'  File "/torch/distributed/c10d_logger.py", line 83 in wrapper\n  File "{attempt}", line 3 in ring\n'
    )
    job = Job("ring", attempt, tmp_path / "check.py", 2)
    assert describe(stacks, job) == "waits in send, exercise.py, line 3: `dist.send(x, 1)`"


@pytest.mark.ranks
def test_checks_tell_what_is_wrong_on_ranks_and_end_hangs(tmp_path: Path) -> None:
    in_a_process("start", "3", folder=tmp_path)
    attempt = tmp_path / "learning/03_collectives/exercise.py"
    solution = (find_lesson(3).folder / "solution.py").read_text()
    attempt.write_text(
        solution.replace("request = dist.isend(outgoing.contiguous(), to)", "dist.send(outgoing.contiguous(), to)")
        .replace("    request.wait()\n", "")
        .replace("return 2 * (world_size - 1)", "return (world_size - 1)")
    )
    done = in_a_process("check", "3", "ring_bytes", folder=tmp_path)
    assert done.returncode == 1
    assert "The all-gather sends as much again" in done.stdout
    done = in_a_process("check", "3", "all_gather", folder=tmp_path)
    assert done.returncode == 1
    assert "It hangs: the ranks wait for each other." in done.stdout, "seen by its quiet, not by the clock"
    for rank in range(3):
        assert f"rank {rank} waits in send, exercise.py, line " in done.stdout
    attempt.write_text(solution + "\nfor number in range(100_000):\n    print('learner', number)\n")
    done = in_a_process("check", "3", "all_gather", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("learner") == 300 and done.stdout.count("more bytes of what it prints are left out") == 3
    assert json.loads((tmp_path / "learning/progress.json").read_text())["solved"]["03_collectives"] == ["all_gather"]
