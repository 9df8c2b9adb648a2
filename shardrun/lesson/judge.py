"""Checking an attempt: in processes of its own, on as many ranks as the exercise wants, with an end to every hang.

A rank that waits in a collective uses no processor time. So when no rank has for a few seconds, nothing will come any
more, however slow or busy the machine is; then every rank that is not done tells where it is.
"""

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from shardrun.lesson.course import Exercise, Lesson
from shardrun.lesson.rank import (
    BROKEN,
    ERROR,
    PASSED,
    UNREADABLE,
    UNSOLVED,
    WRONG,
    Job,
    messages_of,
    serve,
    source_line,
)  # fmt: skip
from shardrun.lesson.source import parameters, unwritten

HUNG = "hung"

QUIET_SECONDS = 5.0
"""No rank has used the processor for so long: they wait for each other."""
MUTANT_QUIET_SECONDS = 2.0
"""The same of a mutant."""
QUIET_SHARE = 0.01
"""So little of a processor counts as none."""
LONGEST = 90.0
"""Seconds of the processor after which an attempt that is still busy is ended; four times as many by the clock."""
MUTANT_SECONDS = 10.0
"""The same of a mutant; twelve times as many by the clock, for a busy machine must not refuse one that passes."""
IN_THE_CHECK = "has left your function and waits for the others in the check"

PRELOADED = [
    "shardrun.lesson.interpreted", "torch", "torch.distributed", "torch._dynamo", "hypothesis", "lessons.checking",
    "lessons.cases",
]  # fmt: skip

GRACE = 2.0
"""Seconds that the other ranks have once one has failed."""


@dataclass(frozen=True)
class Outcome:
    """status: passed, unsolved, wrong, error, hung, unreadable or broken; message: what the learner is told."""

    status: str
    message: str = ""
    recorded: tuple[str, ...] = ()
    """Per rank: its messages as they were noted, where that was asked for (shardrun/lesson/messages)."""

    @property
    def passed(self) -> bool:
        return self.status == PASSED


def judge(
    lesson: Lesson,
    exercise: Exercise,
    attempt: Path,
    other: str = "",
    others: str = "wrong.py",
    quick: bool = False,
    record: bool = False,
) -> Outcome:
    """Check the function in the file `attempt` (or, for `verify`, the function `other` of wrong.py in its place).

    quick: only whether it passes is asked for, as of a mutant: no case is made smaller, and it ends after less time.
    record: the messages that it sends are noted.
    """
    check = (lesson.folder / "check.py").resolve()
    names = parameters(lesson.folder / "solution.py", exercise.name)
    job = Job(
        exercise.name, attempt.resolve(), check, exercise.ranks, other, others, names, exercise.changes, quick,
        record=record,
    )  # fmt: skip
    return _judged(job, MUTANT_SECONDS if quick else LONGEST)


def judge_level(lesson: Lesson, level: Exercise, attempt: Path, ranks: int) -> Outcome:
    """Check one level of a capstone, the strategy in the file `attempt`, on so many ranks.

    Where not even its `__init__` is written that is said without starting any.
    """
    if line := unwritten(attempt).get("__init__"):
        how = "Begin with __init__, parts and held; then write what the trainer calls, in its order, and check often."
        return Outcome(UNSOLVED, f"Nothing is written yet ({attempt.name}, line {line}). {how}")
    check = (lesson.folder.parent / "capstone" / "levels.py").resolve()
    return _judged(Job(level.name.partition(".")[2], attempt.resolve(), check, ranks, capstone=True), LONGEST)


def record_step(lesson: Lesson, attempt: Path, ranks: int) -> Outcome:
    """Note the messages of a step of the strategy in the file `attempt`. Passed: it came to its end."""
    check = (lesson.folder.parent / "capstone" / "recorded_step.py").resolve()
    return _judged(Job("step", attempt.resolve(), check, ranks, capstone=True, record=True), LONGEST)


def _judged(job: Job, longest: float) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        ranks = _start(job, Path(folder))
        try:
            outcome = _wait(job, ranks, Path(folder), longest)
            return replace(outcome, recorded=_recorded(job, Path(folder))) if job.record else outcome
        finally:
            for process, pipe in ranks:
                pipe.close()
                process.kill()
                process.join()


def _recorded(job: Job, scratch: Path) -> tuple[str, ...]:
    paths = [messages_of(scratch, rank) for rank in range(job.ranks)]
    return tuple(path.read_text(encoding="utf-8") if path.exists() else "" for path in paths)


def _start(job: Job, scratch: Path) -> list[tuple[Any, Connection]]:
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        # Imported once, not once per rank and exercise (an optimizer's first step imports torch._dynamo: seconds).
        context.set_forkserver_preload(PRELOADED)
    ranks = []
    for rank in range(job.ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(job, rank, scratch, theirs), daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    return ranks


def _wait(job: Job, ranks: list[tuple[Any, Connection]], scratch: Path, longest: float) -> Outcome:
    ready: set[int] = set()
    answers: dict[int, tuple[str, str]] = {}
    started = quiet_since = time.monotonic()
    used, failed_at, begun, too_long = 0.0, 0.0, 0.0, False
    while len(answers) < len(ranks):
        left = {pipe: rank for rank, (_, pipe) in enumerate(ranks) if rank not in answers}
        arrived: Any = wait(list(left), timeout=0.1)
        for pipe in arrived:
            rank = left[pipe]
            try:
                said = pipe.recv()
            except EOFError:
                said = (ERROR, "The process ended in the middle of the check.")
            if said == "ready":
                ready.add(rank)
            else:
                answers[rank] = said
        now = time.monotonic()
        failed_at = failed_at or (now if any(status != PASSED for status, _ in answers.values()) else 0.0)
        seconds, wants_more = _processor_seconds(ranks)
        if abs(seconds - used) > QUIET_SHARE * (now - quiet_since) or wants_more or len(ready) < len(ranks):
            used, quiet_since = seconds, now
        if len(ready) < len(ranks):
            started, begun = now, seconds  # the clock is the attempt's, not that of imports
        if failed_at and now - failed_at > (0.0 if job.quick else GRACE):
            break
        too_long = seconds - begun > longest * job.ranks or now - started > (12 if job.quick else 4) * longest
        if now - quiet_since > (MUTANT_QUIET_SECONDS if job.quick else QUIET_SECONDS) or too_long:
            break
    waiting = _where(job, ranks, answers, scratch) if len(answers) < len(ranks) else []
    return _verdict(answers, waiting, job.ranks, longest if too_long else 0.0)


def _processor_seconds(ranks: list[tuple[Any, Connection]]) -> tuple[float, bool]:
    """Of all ranks, with the processes that a check may have started; and whether one of them could use more now.

    Less than before where one of those has ended. On a machine that is very busy a rank may get nothing for seconds: it
    is no hang where it does not wait.
    """
    total, wants_more = 0.0, False
    for process, _ in ranks:
        try:
            rank = psutil.Process(process.pid)
            for each in (rank, *rank.children(recursive=True)):
                times = each.cpu_times()
                total += times.user + times.system
                wants_more = wants_more or each.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
        except psutil.Error:
            pass
    return total, wants_more


def _verdict(answers: dict[int, tuple[str, str]], waiting: list[str], ranks: int, busy: float) -> Outcome:
    for status in (UNREADABLE, UNSOLVED, WRONG, ERROR, BROKEN):
        said = {rank: message for rank, (kind, message) in sorted(answers.items()) if kind == status}
        if not said:
            continue
        # Where one ended, the others lose its connection: that says nothing of the mistake.
        rank, message = min(said.items(), key=lambda each: "by peer" in each[1])
        if message and len(said) < ranks and ranks > 1 and status != UNREADABLE:
            message = f"On rank {rank}: {message}"
        if status != UNSOLVED:  # what the others are doing in the learner's code belongs to the picture
            message = "\n".join([message, *(line for line in waiting if not line.endswith(IN_THE_CHECK))])
        return Outcome(status, message)
    if waiting:
        many = "It hangs: the ranks wait for each other." if ranks > 1 else "It hangs."
        head = f"It is still busy after {busy:.0f} s." if busy else many
        done = [f"rank {rank} is done" for rank in sorted(answers)] if ranks > 1 else []
        return Outcome(HUNG, "\n".join([head, *waiting, *done]))
    return Outcome(PASSED, answers[0][1])  # a level of a capstone has something to say then too


def _where(job: Job, ranks: list[tuple[Any, Connection]], answers: dict[int, Any], scratch: Path) -> list[str]:
    """For every rank without an answer: the collective that it waits in, and the learner's line that called it."""
    left = [rank for rank in range(len(ranks)) if rank not in answers]
    if job.quick or not hasattr(signal, "SIGUSR1"):
        return [f"rank {rank} is not done" for rank in left]
    for rank in left:
        if ranks[rank][0].is_alive():
            os.kill(ranks[rank][0].pid, signal.SIGUSR1)
    time.sleep(0.5)
    return [
        f"rank {rank} {describe((scratch / f'stacks{rank}').read_text(encoding='utf-8', errors='replace'), job)}"
        for rank in left
    ]


def describe(stacks: str, job: Job) -> str:
    """From faulthandler's stacks (innermost call first) to words: what this rank waits in, and where it was called."""
    for thread in re.split(r"\n(?=\S)", stacks):
        frames = re.findall(r'File "(.+)", line (\d+) in (\S+)', thread)
        ours = next((i for i, (path, _, _) in enumerate(frames) if path in job.files), None)
        if ours is not None:
            path, line, _ = frames[ours]
            calls = [name for path, _, name in frames[:ours] if path.endswith("distributed_c10d.py")]
            place = f"{Path(path).name}, line {line}: `{source_line(path, int(line))}`"
            return f"waits in {calls[-1]}, {place}" if calls else f"is at {place}"
    return IN_THE_CHECK
