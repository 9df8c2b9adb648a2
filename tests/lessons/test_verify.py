"""Every lesson holds what it promises: `shardrun lesson verify`, without the commands that do again what others do.

Those are run by the whole of it (`python -m benchmarks.lessons_verified`), and every launch among them goes through its
checks up to the process group in tests/rehearsal.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardrun.lesson.course import Lesson, course, find_lesson
from shardrun.lesson.mutants import mutants, sample
from shardrun.lesson.source import Command, commands, right_attempts, wrong_attempts
from shardrun.lesson.verify import MUTANTS, run_commands
from tests.warm import Warm

ROOT = Path(__file__).parent.parent.parent
STEPS = "3"
"""Of a demo, in place of up to eighty."""
INTERPRETED = 15
"""This lesson asks for Triton's interpreter."""

LAUNCH = "accelerate launch --config_file learning/accelerate_configs/cpu/"
LEFT_OUT = {
    9: {"shardrun compare": "in tests/shardrun/test_compare.py"},
    10: {f"{LAUNCH}fsdp.yaml": "the same as alone, but for the strategy; FSDP is lesson 8's"},
    11: {f"{LAUNCH}ddp.yaml --num_processes 4": "as on two ranks; four are lesson 3's"},
    12: {f"{LAUNCH}ddp.yaml": "the same as alone, but for the strategy"},
    13: {f"{LAUNCH}ddp.yaml": "as under FSDP"},
    14: {f"{LAUNCH}zero1.yaml": "as under DDP; ZeRO-1 is lesson 5's"},
    17: {
        f"{LAUNCH}ddp.yaml": "the same as alone, but for the strategy",
        "shardrun ablate": "in tests/shardrun/ablate",
    },
    18: {f"{LAUNCH}zero3.yaml": "as under DDP; ZeRO-3 is lesson 7's"},
}
"""Lesson → how a command begins that is not run here → why."""

CHECKED = 5
"""`shardrun lesson check N` is run for this lesson alone: test_runner.py judges the solutions of all."""

TRAINER = " --data.global-batch 4 --data.sequence-length 32 --data.eval-tokens 512"
"""What is added to launches of the trainer itself."""


def left_out(lesson: Lesson, command: Command) -> bool:
    if command.text.startswith("shardrun lesson check "):
        return lesson.number != CHECKED
    return any(command.text.startswith(beginning) for beginning in LEFT_OUT.get(lesson.number, {}))


def test_what_is_left_out_is_there_and_every_demo_and_config_is_run() -> None:
    run, all_configs = set(), set()
    for lesson in course():
        there = [command for command in commands(lesson.folder / "README.md") if not command.gpu]
        for beginning in LEFT_OUT.get(lesson.number, {}):
            assert any(command.text.startswith(beginning) for command in there), beginning
        texts = [command.text for command in there if not left_out(lesson, command)]
        assert any("demo.py" in text for text in texts), lesson.name
        run |= set(re.findall(r"cpu/\w+\.yaml", " ".join(texts)))
        all_configs |= set(re.findall(r"cpu/\w+\.yaml", " ".join(command.text for command in there)))
    assert run == all_configs


@contextmanager
def warmed(number: int, warm_python: str) -> Iterator[str]:
    """The Python that a lesson runs in."""
    if number != INTERPRETED or sys.platform != "linux":
        yield warm_python
        return
    warm = Warm(interpreted=True)
    try:
        yield str(warm.python)
    finally:
        warm.close()


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [lesson.number for lesson in course()])
def test_verify(number: int, warm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsolved at first, solutions pass, wrong attempts are told what they did, and commands of the README run."""
    monkeypatch.setenv("SHARDRUN_LESSON_STEPS", STEPS)
    lesson = find_lesson(number)
    wrong, right = wrong_attempts(lesson.folder / "wrong.py"), right_attempts(lesson.folder / "right.py")
    attempts = sum(2 + len(wrong[e.name]) + len(right.get(e.name, [])) for e in lesson.exercises)
    attempts += sum(len(sample(mutants(lesson.folder / "solution.py", e.name), MUTANTS)) for e in lesson.exercises)
    chosen = [
        Command(command.text + TRAINER * ("speedrun.train tiny" in command.text), command.gpu)
        for command in commands(lesson.folder / "README.md")
        if not left_out(lesson, command)
    ]
    with warmed(number, warm_python) as python:
        done = subprocess.run(
            [python, "-m", "shardrun", "lesson", "verify", str(number), "--no-commands"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=400,
        )  # fmt: skip
        assert f"{attempts} attempts, 0 commands, no problems" in done.stdout, done.stdout + done.stderr
        problems = run_commands(lesson, chosen, python)
    assert not problems, f"lesson {number}:\n" + "\n".join(problems)
