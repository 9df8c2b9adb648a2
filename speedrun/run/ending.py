"""How a rank's process ends: its status, and one sentence in place of a traceback where that says more; and how it
notices that another one has gone, so that nobody waits for it.
"""

import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from speedrun.run import signals
from speedrun.run.last_words import leave_for_torchrun, say_once
from strategies.errors import UserError
from strategies.output import any_character

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


class LostRank(RuntimeError):
    """A collective failed: the sentence names the ranks that have ended or hang, and the step."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, after which all ranks have agreed to stop: raised on every rank after the same step."""


class Preempted(Stopped):
    """SIGTERM or its like (speedrun/run/signals.py), after which all ranks have agreed to stop, and saved."""


class NotSaved(Stopped):
    """A checkpoint could not be written, and the run was told to end then."""


class DataLost(Stopped):
    """The data are not what they were when the run began."""


def guarded(job: Callable[[], None]) -> None:
    """Run a rank's job and end this process: with status 0, 2 after a user's mistake, 130 after Ctrl-C, 143 after
    SIGTERM and its like (speedrun/run/signals.py), 1 otherwise (a lost rank, a checkpoint that could not be saved, a
    defect).
    """
    any_character()
    # DeepSpeed calls collectives by names that torch 2.13 deprecates, at every step and on every rank.
    deprecated = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", deprecated, FutureWarning)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="parent", daemon=True).start()
    status, together = 0, True
    try:
        try:
            job()
        finally:
            caught = signals.caught()
            if caught:
                caught.close()  # a cluster signals the launcher too, which passes it on
    except Preempted:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        status = 143
        say_once(signals.PREEMPTED)
    except (NotSaved, DataLost) as error:
        status = 1
        say_once(f"shardrun: error: {error}")
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun may pass on what the terminal has sent already
        status, together = 130, isinstance(interrupt, Stopped)
        say_once(signals.INTERRUPTED)
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
    except OSError as error:
        status, together = 2 if error.filename else 1, False
        if error.filename:  # a file or folder that cannot be read or written
            say_once(f"shardrun: error: {error}")
        else:
            traceback.print_exc()
            leave_for_torchrun(f"{type(error).__name__}: {error}")
    except Exception as error:
        status, together = 1, False
        if caught and caught.heard:  # a compiler that got the signal too, for example
            status = 130 if caught.interrupted else 143
            say_once(broken_off(caught.name, error))
        elif type(error).__name__ == "FailOnRecompileLimitHit":  # of torch._dynamo, which takes seconds to import
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


class Peers:
    """Around a run: a collective that failed becomes a sentence that names the ranks which have gone, and the step."""

    def __enter__(self) -> "Peers":
        self.step = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER + TIMED_OUT):
            if caught := signals.caught():  # torchrun ends those whom a rank has left behind: they have a say first
                caught.orderly()
            raise LostRank(_who_is_lost(self.step)) from error


def broken_off(name: str, error: BaseException) -> str:
    """What to say of a step that a signal of this name has broken, because it reached more than this process."""
    why = (str(error).strip() or "no words").splitlines()[0][:200]
    return (
        f"shardrun: {name} broke the step off ({type(error).__name__}: {why}); what came after the last checkpoint is "
        "lost; --resume auto goes on from there."
    )


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


def outcome(error: BaseException, asked: signals.Signals) -> str:
    """The status that a run's summary gets."""
    if isinstance(error, KeyboardInterrupt) and not isinstance(error, NotSaved | DataLost):
        return "preempted" if isinstance(error, Preempted) else "interrupted"
    if asked.heard and not isinstance(error, (*USER_ERRORS, LostRank, NotSaved, DataLost)):
        return "interrupted" if asked.interrupted else "preempted"
    return "failed"
