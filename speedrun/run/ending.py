"""How a rank's process ends, so that a person sees one sentence and nobody waits for a rank that has gone.

torchrun (which is inside accelerate launch) ends all ranks as soon as one ends with an error, and closes with a summary
of what each left in a file. So a sentence goes to both places: printed by whichever rank has it first, and the file,
for the last line of that summary. A single process has no torchrun: there accelerate launch itself prints a traceback
after whatever ended with a status that is not 0, unless it is told --quiet, as the shipped single*.yaml tell it. So the
sentence waits until the launcher has ended.
"""

import hashlib
import os
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

from strategies import strict_json
from strategies.errors import UserError

USER_ERRORS = (UserError, FileNotFoundError, FileExistsError, FloatingPointError)
"""What a user's mistake raises, with a sentence to show in place of a traceback."""

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What gloo and NCCL say in a rank whose peer has ended."""


TIMED_OUT = ("Timed out waiting", "Timed out after", "timeout")
"""What they say in a rank whose peer has not joined a collective in time."""

ANSWER = 3.0
"""Seconds in which every rank that still goes on has noticed that a collective failed, and said so to the others."""

ORPHANED = 20.0
"""Seconds in which a rank whose launcher is gone must have saved and ended."""


LAUNCHER_ENDS = 10.0
"""Seconds within which accelerate launch ends after its one process."""


class LostRank(RuntimeError):
    """A collective failed: the sentence names the ranks that have ended or hang, and the step."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, after which all ranks have agreed to stop: raised on every rank after the same step."""


class Preempted(Stopped):
    """SIGTERM, by which machines are taken back, after which all ranks have agreed to stop, and saved."""


class NotSaved(Stopped):
    """A checkpoint could not be written, and the run was told to end then."""


class DataLost(Stopped):
    """The data are not what they were when the run began."""


def guarded(job: Callable[[], None]) -> None:
    """Run a rank's job and end this process: with status 0, 2 after a user's mistake, 130 after Ctrl-C, 143 after
    SIGTERM, 1 otherwise (a lost rank, a checkpoint that could not be saved, a defect).
    """
    # DeepSpeed calls collectives by names that torch 2.13 deprecates, at every step and on every rank.
    deprecated = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", deprecated, FutureWarning)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="parent", daemon=True).start()
    status, together = 0, True
    try:
        job()
    except Preempted:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster sends it to the launcher too, which passes it on
        status = 143
        say_once("shardrun: preempted; a run with checkpoint.every has saved its last step; --resume auto goes on.")
    except (NotSaved, DataLost) as error:
        status = 1
        say_once(f"shardrun: error: {error}")
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun may pass on what the terminal has sent already
        status, together = 130, isinstance(interrupt, Stopped)
        say_once("shardrun: interrupted; a run that had begun holds everything up to its last step.")
    except USER_ERRORS as error:
        status, together = 2, False
        say_once(f"shardrun: error: {error}")
    except LostRank as error:
        status, together = 1, False
        say_once(f"shardrun: error: {error}")
    except BrokenPipeError:
        status, together = 1, False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush below is quiet
        say_once("shardrun: nobody reads the output any more (`| head`?), and so this rank ends.")
    except Exception as error:
        status, together = 1, False
        if type(error).__name__ == "FailOnRecompileLimitHit":  # of torch._dynamo, which takes seconds to import
            say_once(
                "shardrun: error: torch.compile has used up its limit of variants of one block, and the next one would "
                "run uncompiled: use --no-compile, or see TORCH_LOGS=recompiles for what changes from call to call."
            )
        elif any(words in str(error) for words in LOST_PEER):
            say_once("shardrun: another rank has ended, and so this one does; what that one said tells why.")
        else:
            traceback.print_exc()
            leave_for_torchrun(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        if together:
            dist.barrier()
            dist.destroy_process_group()
        # gloo's threads now and then abort a process that ends in the ordinary way; all files are closed by now.
        os._exit(status)
    sys.exit(status)


def say_once(message: str) -> None:
    """Print to stderr, unless another rank of this machine has said the same, and leave it for torchrun's summary."""
    leave_for_torchrun(message)
    if speaks_first(message) and not say_after_launcher(message):
        print(message, file=sys.stderr, flush=True)


def say_after_launcher(message: str) -> bool:
    """Print to stderr when accelerate launch has ended, from a process of its own: the last thing on the screen.

    False, and nothing printed, where no accelerate launch that may print a traceback is the parent of this process.
    """
    launcher = os.getppid()
    try:
        command = Path(f"/proc/{launcher}/cmdline").read_bytes().decode(errors="replace").split("\0")
        ended = os.pidfd_open(launcher)
    except (OSError, AttributeError):  # no Linux
        return False
    # python …/accelerate launch, or python -m accelerate.commands…
    accelerate = any("accelerate" in Path(word).name for word in command[:3])
    if not accelerate or "TORCHELASTIC_RUN_ID" in os.environ or {"-q", "--quiet"} & set(command):
        return False
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of a fork beside threads; this one only writes
        if os.fork():
            return True
    try:
        select.select([ended], [], [], LAUNCHER_ENDS)
        os.write(2, f"{message}\n".encode())
    finally:
        os._exit(0)


def speaks_first(what: str) -> bool:
    """Whether this is the first rank on its machine to ask this. The others get their answer after a second: when one
    of them ended earlier, torchrun would end all ranks, the one that is about to speak too.
    """
    if _first(what):
        return True
    time.sleep(1)
    return False


def _first(what: str) -> bool:
    """Whether no other rank of this machine has asked this before, in this attempt of torchrun's."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")  # …/attempt_0/RANK/error.json
    if not path:
        return True
    try:
        (Path(path).parents[1] / hashlib.sha256(what.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


class Interruptible:
    """While it is open, Ctrl-C only sets `interrupted`, and SIGTERM `preempted`: the loop goes on until all ranks have
    agreed to stop after the same step. One that stopped by itself would leave the others in a collective that it never
    joins.

    A second Ctrl-C, more than a second after the first, interrupts at once. SIGTERM never does: whoever sends it kills
    what has not ended in time (torchrun after 30 s).
    """

    def __enter__(self) -> "Interruptible":
        self.interrupted = self.preempted = False
        self.step = 0
        self._since = 0.0
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:  # torchrun sends SIGTERM to those whom a rank has left behind: they have something to say first
            if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER + TIMED_OUT):
                raise LostRank(_who_is_lost(self.step)) from error
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.preempted = True
            return
        if self.interrupted and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt
        if not self.interrupted:
            self.interrupted, self._since = True, time.monotonic()


def _who_is_lost(step: int) -> str:
    """Every rank that still goes on meets the failure too and leaves a note; those who leave none are the cause."""
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    others = range(dist.get_world_size())
    key = "shardrun/noticed/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store.set(f"{key}/{rank}", str(step))
        time.sleep(ANSWER)
        lost = [str(other) for other in others if not store.check([f"{key}/{other}"])]
    except RuntimeError:  # the store went with the launcher, or with rank 0
        lost = []
    who = f"rank{'s' if len(lost) > 1 else ''} {', '.join(lost)}" if lost else "another rank"
    return f"{who} ended or hung in step {step}, and so all end; --resume auto goes on from the last checkpoint."


def _may_be_launcher(parent: int) -> bool:
    """Whether a rank of torchrun still has it as its parent: it may have been killed while this rank still imported,
    and then the parent has been another from the beginning. True where this cannot be told."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:  # no Linux
        return True
    return any(name in command for name in (b"python", b"accelerate", b"torchrun"))


def _end_with_parent(parent: int) -> None:
    """In a thread: when the launcher is gone, nobody else would end this rank. As after SIGTERM, and then at once."""
    while os.getppid() == parent and _may_be_launcher(parent):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHANED)
    os._exit(143)


def as_exception(preempted: float = 0.0, interrupted: float = 0.0, not_saved: float = 0.0) -> Stopped | None:
    """What to raise on all ranks, or None. Each number is not 0 where any rank was asked to end, or has to, for that.

    A checkpoint that was not saved counts for most; a Ctrl-C for more than SIGTERM, as a person is behind it.
    """
    if not_saved:
        return NotSaved(
            "a checkpoint could not be saved (the warning above says why), and checkpoint.on_failure is stop: make "
            "room, then go on from the last one with --resume auto."
        )
    if interrupted:
        return Stopped()
    return Preempted() if preempted else None


def outcome(error: BaseException) -> str:
    """The status that a run's summary gets."""
    if isinstance(error, KeyboardInterrupt) and not isinstance(error, (NotSaved, DataLost)):
        return "preempted" if isinstance(error, Preempted) else "interrupted"
    return "failed"


def leave_for_torchrun(message: str) -> None:
    """torchrun prints this as the rank's traceback in its closing summary. Ranks of a machine that have the same to say
    leave it once."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and _first(f"left: {message}"):
        # A second early: the summary ends with the earliest failure, and who is ended for this one has no file.
        details = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()) - 1)}}
        with open(path, "w", encoding="utf-8") as file:
            file.write(strict_json.dumps({"message": details}))
