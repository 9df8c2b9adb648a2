"""`shardrun lesson verify`: every exercise starts unsolved, every solution and every other right one passes, every
wrong attempt gets a message that names its mistake, no mutant of a solution passes, and every command of a README runs.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardrun.launch import shipped_names
from shardrun.lesson.course import Exercise, Lesson
from shardrun.lesson.judge import HUNG, Outcome, judge
from shardrun.lesson.mutants import Mutant, equal_ones, mutants, sample
from shardrun.lesson.rank import ERROR, UNSOLVED, WRONG
from shardrun.lesson.source import Command, commands, functions, right_attempts, wrong_attempts

FILES = ("README.md", "demo.py", "exercise.py", "solution.py", "check.py", "wrong.py")
SECTIONS = ("Goal", "Mental model", "Terms", "Run it", "What to look at", "Exercises", "Questions", "Sources")
WRONG_ATTEMPTS = 5
"""So many per exercise at least."""
MUTANTS = 2
"""So many of an exercise's are tried; all of them by benchmarks/lesson_mutants.py."""
EXERCISES = 3
"""So many per lesson at least, one of them accounting."""
LONGEST_COMMAND = 600.0
COLUMNS = 100
"""Of the terminal that lessons are made for."""


@dataclass(frozen=True)
class Verified:
    """What was tried of a lesson, and what of it does not hold, in sentences."""

    attempts: int
    commands: int
    seconds: float
    problems: list[str]

    def __str__(self) -> str:
        tried = f"{self.attempts} attempts, {self.commands} commands"
        return f"{tried}, {len(self.problems) or 'no'} problems, {self.seconds:.0f} s"


def verify(lessons: list[Lesson], commands: bool = True) -> int:
    """Print what does not hold; returns the exit status."""
    problems = []
    for lesson in lessons:
        found = verify_lesson(lesson, commands)
        print(f"lesson {lesson.number}, {lesson.title}: {found}", flush=True)
        for problem in found.problems:
            print(f"  ✗ {problem}", flush=True)
        problems += found.problems
    return 1 if problems else 0


def verify_lesson(lesson: Lesson, with_commands: bool = True) -> Verified:
    """Try every attempt of a lesson and, if wanted, every command of its README."""
    started = time.perf_counter()
    if missing := _files(lesson):
        return Verified(0, 0, time.perf_counter() - started, missing)
    attempts, problems = _exercises(lesson)
    found = commands(lesson.folder / "README.md") if with_commands else []
    problems += run_commands(lesson, found)
    count = sum(not command.gpu for command in found)
    return Verified(attempts, count, time.perf_counter() - started, problems)


def _files(lesson: Lesson) -> list[str]:
    """What is missing before anything can run."""
    missing = [f"{name} is missing" for name in FILES if not (lesson.folder / name).is_file()]
    if missing:
        return missing
    names = [exercise.name for exercise in lesson.exercises]
    problems = []
    for name in ("exercise.py", "solution.py", "check.py"):
        if absent := [e for e in names if e not in functions(lesson.folder / name)]:
            problems.append(f"{name} has no {', '.join(absent)}")
    if extra := [e for e in functions(lesson.folder / "exercise.py") if e not in names]:
        problems.append(f"lesson.toml does not name {', '.join(extra)}")
    if len(names) < EXERCISES or not any(exercise.accounting for exercise in lesson.exercises):
        problems.append(f"{EXERCISES} exercises, one of them accounting, are the least")
    problems += [f"{exercise.name} has no hint" for exercise in lesson.exercises if not exercise.hints]
    readme = (lesson.folder / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", readme, re.M)
    problems += [f"README.md has no section {name!r}" for name in SECTIONS if name not in headings]
    configs = (lesson.live.demo, lesson.live.config)
    problems += [f"[live] names no shipped config: {c}" for c in configs if c is not None and c not in shipped_names()]
    parts = ("```mermaid", "<details>", "```sh gpu")
    problems += [f"README.md has no {part!r}" for part in parts if part not in readme]
    problems += [f"README.md does not mention {name}" for name in names if f"`{name}`" not in readme]
    return problems


def _exercises(lesson: Lesson) -> tuple[int, list[str]]:
    """How many attempts were judged, and what is wrong with the judgements."""
    judged, problems = 0, []
    wrong = wrong_attempts(lesson.folder / "wrong.py")
    right = right_attempts(lesson.folder / "right.py")
    solution = lesson.folder / "solution.py"
    for exercise in lesson.exercises:
        first = judge(lesson, exercise, lesson.folder / "exercise.py")
        if first.status != UNSOLVED:
            problems.append(f"{exercise.name} does not start unsolved but {first.status}: {first.message}")
        solved = judge(lesson, exercise, solution)
        if not solved.passed:
            problems.append(f"{exercise.name}: its solution is {solved.status}: {solved.message}")
        attempts = wrong.get(exercise.name, [])
        if len(attempts) < WRONG_ATTEMPTS:
            problems.append(f"{exercise.name} has {len(attempts)} wrong attempts, not {WRONG_ATTEMPTS}")
        others = right.get(exercise.name, [])
        if not others and not exercise.accounting:
            problems.append(f"{exercise.name} has no second right solution in right.py")
        for name in others:
            outcome = judge(lesson, exercise, solution, name, "right.py")
            if not outcome.passed:
                problems.append(f"{exercise.name}: the right {name} is {outcome.status}: {outcome.message}")
        for name, says in attempts:
            problems += _told(exercise, name, says, judge(lesson, exercise, solution, name))
        judged += 2 + len(attempts) + len(others)
        some = sample(mutants(solution, exercise.name), MUTANTS)
        problems += [f"{exercise.name}: the mutant {each} passes" for each in survivors(lesson, exercise, some)]
        judged += len(some)
    return judged, problems


def survivors(lesson: Lesson, exercise: Exercise, tried: Sequence[Mutant]) -> list[str]:
    """The changes among these mutants that the check lets pass, and that the lesson does not call equal."""
    equal = equal_ones(lesson.folder).get(exercise.name, {})
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        attempt = Path(folder) / "exercise.py"
        for mutant in tried:
            if mutant.change in equal:
                continue
            attempt.write_text(mutant.text, encoding="utf-8")
            if judge(lesson, exercise, attempt, quick=True).passed:
                alive.append(mutant.change)
    return alive


def _told(exercise: Exercise, name: str, says: str, outcome: Outcome) -> list[str]:
    """A wrong attempt must not pass, and must be told what it did."""
    if outcome.status not in (WRONG, HUNG, ERROR):
        return [f"{exercise.name}: the wrong attempt {name} is {outcome.status}"]
    if says not in outcome.message:
        return [f"{exercise.name}: the wrong attempt {name} is not told {says!r} but: {outcome.message}"]
    return []


def run_commands(lesson: Lesson, commands: Sequence[Command], python: str = sys.executable) -> list[str]:
    """Run commands of a README one after another, in an empty folder, as a learner who solves every exercise would.

    python: what they run in, with an `accelerate` beside it. Returns what does not hold.
    """
    root = Path(__file__).parent.parent.parent
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        for command in commands:
            if command.gpu:
                problems += _gpu_command(command, Path(folder))
                continue
            _solve(lesson, Path(folder))
            environment = {
                **os.environ,
                "PATH": os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")]),
                "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
                "COLUMNS": str(COLUMNS),
            }
            text = f'shardrun() {{ {shlex.quote(python)} -m shardrun "$@"; }}\n{command.text}'
            try:
                done = subprocess.run(
                    ["sh", "-c", text], cwd=folder, env=environment, text=True, capture_output=True,
                    timeout=LONGEST_COMMAND,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                problems.append(f"`{command.text}` takes more than {LONGEST_COMMAND:.0f} s")
                continue
            if done.returncode:
                end = "\n    ".join((done.stdout + done.stderr).splitlines()[-12:])
                problems.append(f"`{command.text}` ended with status {done.returncode}:\n    {end}")
            ours = "lesson" in command.text or "learning/" in command.text
            lines = [line for line in done.stdout.splitlines() if "real_accelerator.py" not in line]  # DeepSpeed's log
            if wide := [line for line in lines if ours and len(line) > COLUMNS]:
                problems.append(f"`{command.text}` prints {len(wide[0])} columns: {wide[0]}")
    return problems


def _gpu_command(command: Command, folder: Path) -> list[str]:
    """What needs GPUs is not run; but the files that it names must be there."""
    paths = [word for word in shlex.split(command.text) if word.endswith((".yaml", ".py"))]
    return [f"`{command.text}`: there is no {path}" for path in paths if not (folder / path).is_file()]


def _solve(lesson: Lesson, folder: Path) -> None:
    attempt = folder / "learning" / lesson.name / "exercise.py"
    if attempt.is_file():
        attempt.write_text((lesson.folder / "solution.py").read_text(encoding="utf-8"), encoding="utf-8")
