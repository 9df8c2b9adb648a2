"""The process in which an exercise is checked: one per rank, started by shardrun/lesson/judge.py."""

import faulthandler
import linecache
import os
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from shardrun.by_path import import_file

LINES, BYTES = 100, 10_000
"""Of what an attempt prints, so much is shown of each rank."""

LET_GO = "The memory of a tensor had been let go before it was used: a parameter that has to be gathered again first?"

LONGEST = 4000
"""Characters of what is wrong."""

PASSED, UNSOLVED, WRONG, ERROR = "passed", "unsolved", "wrong", "error"
UNREADABLE = "unreadable"
"""The learner's file cannot be imported: none of its exercises can be checked."""
BROKEN = "broken"
"""The check itself broke: no mistake of the learner's."""


@dataclass(frozen=True)
class Job:
    """check.py's function `exercise` on the function of that name in `attempt`, on `ranks` ranks."""

    exercise: str
    attempt: Path
    check: Path
    ranks: int
    other: str = ""
    """A function of `others` that takes the exercise's place (for `verify`)."""
    others: str = "wrong.py"
    """The file beside check.py that has it: wrong.py or right.py."""
    parameters: tuple[str, ...] = ()
    """Of the exercise, in order: what its arguments are called in messages, whatever the learner calls them."""
    changes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The arguments that it may change (Exercise.changes)."""
    quick: bool = False
    """Nobody reads the message: a generated case that fails is not made smaller."""
    capstone: bool = False
    """`attempt` is a whole strategy (shardrun/own), and `check` lessons/capstone/levels.py, with its levels."""
    record: bool = False
    """Its messages are to be shown: they are noted in the scratch folder (`messages_of`)."""

    @property
    def files(self) -> tuple[str, ...]:
        """Whose lines are the learner's."""
        return str(self.attempt), str(self.check.with_name(self.others))


def messages_of(scratch: Path, rank: int) -> Path:
    """Where a rank notes its messages (shardrun/lesson/messages/recorder.py)."""
    return scratch / f"messages{rank}"


def serve(job: Job, rank: int, scratch: Path, pipe: Connection) -> None:
    """Set up this rank, say "ready", check, answer (status, message), and stay until the pipe is closed."""
    stacks = open(scratch / f"stacks{rank}", "w")  # noqa: SIM115  open as long as the process lives
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    sys.dont_write_bytecode = True  # nothing beside the learner's files, and nothing stale when they change
    world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.ranks)}
    world |= {"LOCAL_WORLD_SIZE": str(job.ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(world, PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1")
    import torch

    from shardrun.lesson import interpreted  # noqa: F401  before Triton; where this is no fork, nothing has done so

    os.environ.pop("TRITON_INTERPRET")  # programs that a check starts decide for themselves
    torch.set_num_threads(1)
    if job.ranks > 1:
        _join(job.ranks, rank, scratch)
    try:
        pipe.send("ready")
        with Bounded(), _recording(job, messages_of(scratch, rank)):
            status, message = _answer(job)
        pipe.send((status, message if len(message) <= LONGEST else f"{message[:LONGEST]} …"))
        pipe.recv()  # the others may be in a collective with this rank: do not end before them
    except (EOFError, OSError):  # the judge has heard enough
        os._exit(0)


@contextmanager
def _recording(job: Job, path: Path) -> Iterator[None]:
    """Where messages are to be shown, those of the learner's calls are noted."""
    if not job.record:
        yield
        return
    from shardrun.lesson import called
    from shardrun.lesson.messages.recorder import MessageRecorder

    with MessageRecorder(path) as called.CALLS.recorder:
        yield


class Bounded:
    """While it is open, what this process and those that it starts print is shown up to LINES and BYTES."""

    def __enter__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._shown = [os.dup(1), os.dup(2)]
        read, write = os.pipe()
        for number in (1, 2):
            os.dup2(write, number)
        os.close(write)
        self._thread = threading.Thread(target=self._pass_on, args=(read, self._shown[0]), daemon=True)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, shown in zip((1, 2), self._shown, strict=True):
            os.dup2(shown, number)
        self._thread.join(1.0)  # a process that the attempt has started may hold the pipe open

    @staticmethod
    def _pass_on(read: int, shown: int) -> None:
        lines, size, left_out = LINES, BYTES, 0
        while chunk := os.read(read, 1 << 16):
            part = b"".join(chunk[:size].splitlines(keepends=True)[:lines])
            lines, size = lines - part.count(b"\n"), size - len(part)
            os.write(shown, part)
            left_out += len(chunk) - len(part)
            if left_out:
                lines = size = 0
        if left_out:
            os.write(shown, f"\n… {left_out:,} more bytes of what it prints are left out.\n".encode())


def _join(ranks: int, rank: int, scratch: Path) -> None:
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    store = (scratch / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
    dist.barrier()  # connections are made now, not in the learner's first collective


def _answer(job: Job) -> tuple[str, str]:
    from shardrun.lesson import called
    from shardrun.lesson.wrong import Unsolved, Wrong

    called.CALLS.files, called.CALLS.quick = job.files, job.quick
    warnings.simplefilter("ignore")  # of libraries: they are nothing that the learner could act on
    if job.capstone:
        return _answer_level(job)
    try:
        learner = import_file(job.attempt, "exercise")
        if job.other:
            setattr(learner, job.exercise, getattr(import_file(job.check.with_name(job.others), "other"), job.other))
    except BaseException as error:
        return UNREADABLE, _unreadable(error, job)
    if not hasattr(learner, job.exercise):
        return WRONG, f"There is no function {job.exercise} in {job.attempt.name} any more; its name must stay."
    function = called.watched(getattr(learner, job.exercise), job.parameters, job.changes)
    try:
        getattr(import_file(job.check, "check"), job.exercise)(function)
    except Unsolved:
        return UNSOLVED, ""
    except Wrong as wrong:
        changed = called.CALLS.changed
        return WRONG, str(wrong) if changed in str(wrong) else f"{wrong}\n{changed}"
    except BaseException as error:  # SystemExit too: a learner's exit() is an error like any other
        if isinstance(error, NotImplementedError) and called.not_begun(error):
            return UNSOLVED, ""
        if called.is_the_learners(error):
            return ERROR, _described(error, job)
        return (WRONG, called.CALLS.changed) if called.CALLS.changed else (BROKEN, _check_broke(error, job))
    return (WRONG, called.CALLS.changed) if called.CALLS.changed else (PASSED, "")


def _answer_level(job: Job) -> tuple[str, str]:
    """A level of a capstone; what the check returns is shown with a level that passes."""
    from shardrun.lesson import called
    from shardrun.lesson.wrong import Wrong
    from shardrun.own import register
    from strategies.errors import UserError

    try:
        own = register(job.attempt)
    except UserError as error:
        return UNREADABLE, str(error)
    except BaseException as error:
        return UNREADABLE, _unreadable(error, job)
    try:
        return PASSED, getattr(import_file(job.check, "check"), job.exercise)(own) or ""
    except (Wrong, UserError) as wrong:
        return WRONG, str(wrong)
    except BaseException as error:
        if isinstance(error, NotImplementedError) and called.not_begun(error):
            return UNSOLVED, _next_to_write(error)
        if not called.is_the_learners(error):
            return BROKEN, _check_broke(error, job)
        gone = f"{_described(error, job)}\n{LET_GO}" if "storage of size 0" in str(error) else ""
        return ERROR, gone or _described(error, job)


def _next_to_write(error: NotImplementedError) -> str:
    """The method of a capstone that is called and not written; what is known of those before it is a note of error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(getattr(error, "__notes__", ()))
    return f"{said} Next to write: {last.name} ({Path(last.filename).name}, line {last.lineno}).".strip()


def _unreadable(error: BaseException, job: Job) -> str:
    """Why a file cannot be imported."""
    if isinstance(error, SyntaxError):
        line = f": `{error.text.strip()}`" if error.text else ""
        return f"{Path(error.filename or '').name}, line {error.lineno}{line}: {error.msg}."
    return _described(error, job)


def _words(error: BaseException) -> str:
    first = textwrap.shorten(str(error).strip().partition("\n\n")[0], 240, placeholder=" …")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _described(error: BaseException, job: Job) -> str:
    """What was raised, the learner's line that led to it, and what the function had been given."""
    from shardrun.lesson import called

    given = f" (given: {called.CALLS.given})" if called.CALLS.given and error is called.CALLS.raised else ""
    if line := called.their_line(error):
        return f"{line} raised {_words(error)}{given}"
    return f"Calling {job.exercise} raised {_words(error)}{given}"


def _check_broke(error: BaseException, job: Job) -> str:
    """The check blames itself."""
    from shardrun.lesson import called

    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(job.check)]
    place = f" ({job.check.parent.name}/{job.check.name}, line {frames[-1].lineno})" if frames else ""
    given = f" Your function had been given: {called.CALLS.given}." if called.CALLS.given else ""
    return (
        f"The check itself broke, this is not your mistake: {_words(error)}{place}.{given} Please report it; what your "
        "function returned may still be unusual."
    )


def source_line(path: str, number: int) -> str:
    """A line of a file, stripped."""
    linecache.checkcache(path)
    return linecache.getline(path, number).strip()
