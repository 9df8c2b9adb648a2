"""The signals that end a run, caught from its process's first moment to its last.

    SIGINT             Ctrl-C
    SIGTERM            schedulers, clouds, containers, `kill`, `timeout`
    SIGHUP             a terminal that is closed, a connection that breaks
    SIGQUIT            Ctrl-\\; torchrun passes these four on to its ranks
    SIGUSR1, SIGUSR2   what Slurm (--signal), SGE (-notify) and LSF send some time before the end
    SIGXCPU            the soft limit of SGE, PBS and `ulimit -t`
    SIGALRM            a `timeout` for want of one (`perl -e alarm`)
    SIGPWR             the power of a machine or a container fails

SIGVTALRM and SIGPROF are not among them: a profiler sends them to its own process. What somebody else handles here
already stays theirs. SIGHUP stays ignored under nohup, but for a rank: torchrun ends on SIGHUP, nohup or not, and kills
what has not ended 30 s later.

Standard library only: the first thing that speedrun/train.py does is to catch them, before torch is imported.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from speedrun.run.last_words import another_has_spoken, say_once

PREEMPTING = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGPWR")
    if hasattr(signal, name)  # Windows has one of them, macOS all but the last
)

INTERRUPTED = "shardrun: interrupted; a run that had begun holds everything up to its last step."
PREEMPTED = "shardrun: preempted; a run with checkpoint.every has saved its last step; --resume auto goes on."

GRACE = 0.5
"""Seconds in which a rank whose peer has died notices that by itself; torchrun sends SIGTERM to those that are left."""

PATIENCE = 15.0
"""Seconds after which a run that was told to end, and still is in a step, writes down what is lost if it is killed:
torchrun gives 30."""


class Signals:
    """While it is open, Ctrl-C only sets `interrupted`, and any other of these signals `preempted`: the loop goes on
    until all ranks have agreed to stop after the same step. One that stopped by itself would leave the others in a
    collective that it never joins.

    A second Ctrl-C, more than a second after the first, interrupts at once. The others never do: whoever sends them
    kills what has not ended in time.
    """

    def __init__(self) -> None:
        self.interrupted = self.preempted = False
        self.name = ""
        """Of the first signal that came."""
        self.record: Callable[[str, str | None], None] | None = None
        """Writes how the run stands into its folder: the status, and what is lost; where there is a folder."""
        self.last_words: Callable[[str], str] | None = None
        """What to print when a signal of this name comes during training; on one rank."""
        self._since = 0.0
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    @property
    def heard(self) -> bool:
        """Whether this process was asked to end."""
        return self.interrupted or self.preempted

    def orderly(self) -> None:
        """From here on there is something to lose, and this process ends in order."""

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, *PREEMPTING):
            if _ours(number):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if number != signal.SIGINT:
            self.preempted = True
        elif not self.interrupted:
            self.interrupted, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > 1:
            raise KeyboardInterrupt


class ProcessSignals(Signals):
    """Those of a process that is nothing but a rank of a run, for all its life. A thread hears of each at once,
    wherever the main thread is: in a collective, in a compiler, in an import.

    Until a step is done there is nothing to lose, and the thread ends the process there and then. After that it says
    what will be lost if the process is killed, and if it takes long writes that down.
    """

    def __init__(self) -> None:
        super().__init__()
        self._nothing_to_lose = True
        self._closed = threading.Event()
        self._deciding = threading.Lock()
        self._heard, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        self.__enter__()
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def orderly(self) -> None:
        with self._deciding:  # if the thread is ending this process, that is waited for here
            self._nothing_to_lose = False

    def close(self) -> None:
        """The process ends by itself now, with the status of what it has done: signals are ignored from here on."""
        global _caught
        self.orderly()
        self._closed.set()
        signal.set_wakeup_fd(-1)
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        _caught = None

    def _watch(self) -> None:
        numbers = {int(number) for number in self._before}
        while (number := os.read(self._heard, 1)[0]) not in numbers:
            pass  # another signal, for somebody else's handler
        name = signal.Signals(number).name
        if name == "SIGTERM" and "TORCHELASTIC_RUN_ID" in os.environ:
            self._closed.wait(GRACE)
        self._deciding.acquire()
        if self._nothing_to_lose:
            self._end(name)
        self._deciding.release()
        if self._closed.is_set():
            return
        if self.last_words:
            print(f"shardrun: {name}: {self.last_words(name)}", file=sys.stderr, flush=True)
        if not self._closed.wait(PATIENCE) and self.record and self.last_words:
            status = "interrupted" if name == "SIGINT" else "preempted"
            lost = f"{PATIENCE:.0f} s after {name} the step was not done. {self.last_words(name)}"
            with suppress(Exception):
                self.record(status, lost)

    def _end(self, name: str) -> None:
        """End this process, which has nothing to lose."""
        interrupted = name == "SIGINT"
        sentence = (
            INTERRUPTED if interrupted else f"shardrun: {name} before the first step: ended, and nothing is lost."
        )
        another = another_has_spoken(
            sentence
        )  # a rank has failed, and so torchrun ends this one: it has its own reason
        with suppress(Exception):
            if self.record and another:
                self.record("failed", "another rank has ended; what that one said tells why.")
            elif self.record:
                self.record("interrupted" if interrupted else "preempted", None)
        with suppress(Exception):
            if not another:
                say_once(sentence)
        flushing = threading.Thread(target=sys.stdout.flush, daemon=True)  # the main thread may be in a write
        flushing.start()
        flushing.join(1)
        os._exit(130 if interrupted else 143)


_caught: ProcessSignals | None = None


def catch() -> ProcessSignals:
    """Catch them for this whole process. Call it in the main thread, where a program begins."""
    global _caught
    _caught = _caught or ProcessSignals()
    return _caught


def caught() -> ProcessSignals | None:
    """What `catch` has made, where it was called and is not closed."""
    return _caught


@contextmanager
def listening() -> Iterator[Signals]:
    """This process's signals; where it is a program of somebody else's, they are caught for the time of this block."""
    if _caught:
        yield _caught
    else:
        with Signals() as signals:
            yield signals


def _ours(number: int) -> bool:
    """Whether nobody here has another use for this signal."""
    handler = signal.getsignal(number)
    if handler == signal.SIG_IGN and number == getattr(signal, "SIGHUP", None):  # nohup's
        return "TORCHELASTIC_RUN_ID" in os.environ
    return handler in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
