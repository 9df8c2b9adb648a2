"""One writer: a run's folder belongs to one process at a time, and everyone can tell whether that process lives.

`run.lock` in the folder says who: host, process, since when. Rank 0 takes it before it reads what it goes on from, and
holds it to its end. Where the file system has flock, a process that dies, however it dies, lets go of it. Where it has
none, and for a process on another host (flock may not reach across hosts), the file decides: on the same host by
whether that process lives, on another one by the file's time, which its holder renews every `BEAT` seconds.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedrun.config import Config
from strategies import strict_json
from strategies.checkpoint.history import read_history
from strategies.errors import UserError

if TYPE_CHECKING:
    from strategies.select import Launch  # which loads torch; whoever reads a folder does not

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
BEAT = 20.0
"""Seconds between two signs of life."""

SILENCE = 180.0
"""Seconds without one after which a process of another host counts as dead."""

CLAIM = 10.0
"""Seconds after which a claim of `_alone` is one of a process that was killed within it."""

DIED = "died"
"""The status of a run that says 'running' and whose process is gone: killed, or its machine went away."""


@dataclass(frozen=True)
class Holder:
    """Who writes a folder. Equal only to itself: a process number that is used again has another `started`."""

    host: str
    space: str
    """Of process numbers: two containers of one name have two."""
    pid: int
    started: str
    since: float
    """Seconds since 1970."""

    @property
    def is_near(self) -> bool:
        """Whether its number is a number of this host's processes."""
        return (self.host, self.space) == (socket.gethostname(), _space())

    def lives(self, lock: Path) -> bool:
        """By its process where that can be seen from here, else by the time of its lock file."""
        if self.is_near:
            return _started(self.pid) == self.started
        try:
            return time.time() - lock.stat().st_mtime < SILENCE
        except OSError:
            return False

    def __str__(self) -> str:
        moment = time.localtime(self.since)
        today = moment[:3] == time.localtime()[:3]
        return (
            f"process {self.pid} on {self.host} since {time.strftime('%H:%M' if today else '%Y-%m-%d %H:%M', moment)}"
        )


class Lock:
    """A folder that this process writes, until `release`. `note`: a sentence about whom it was taken over from."""

    def __init__(self, folder: Path):
        """Raises ValueError where another process writes it, or where it cannot be written."""
        self.path, self.note = folder / LOCK, ""
        self.holder = Holder(socket.gethostname(), _space(), os.getpid(), _started(os.getpid()) or "", time.time())
        self._file = -1
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take(folder)
        except OSError as error:
            self._close()
            raise UserError(
                f"{folder} cannot be written ({error.strerror}): name another folder with --out, or make it writable."
            ) from None
        except UserError:
            self._close()
            raise
        os.register_at_fork(after_in_child=self._close)  # a child that outlives this process must not hold its lock
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="run.lock", daemon=True).start()

    def release(self) -> None:
        """Let go of it; a folder that was made for it and is empty goes too."""
        self._ended.set()
        with suppress(OSError):
            if self._is_the_file() and _read(self.path) == self.holder:
                os.unlink(self.path)
        self._close()
        with suppress(OSError):
            for path in self._made:
                path.rmdir()

    def _take(self, folder: Path) -> None:
        for _ in range(100):  # whoever lets go of it removes the file: what was opened just before is none any more
            opened, before = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), self._file
            self._file = opened
            if before >= 0:
                os.close(before)
            held = _flock(opened)
            if held:
                raise _busy(folder, _read(self.path))
            with _alone(self.path) if held is None else nullcontext():
                if self._is_the_file():
                    self._take_over(folder, by_flock=held is not None)
                    if self._is_the_file():
                        return
        raise OSError(0, "its run.lock is made and removed without end")

    def _take_over(self, folder: Path, by_flock: bool) -> None:
        """Write who holds it now, if nobody does. Where flock has told so, a process of this host does not."""
        before = _read(self.path) if os.fstat(self._file).st_size else None
        if before:
            quiet = time.time() - os.fstat(self._file).st_mtime
            if not (by_flock and before.is_near) and before.lives(self.path):
                raise _busy(folder, before, quiet)
            if not before.is_near:
                self.note = (
                    f"{folder} was being trained by {before}, of which there has been no sign for "
                    f"{quiet / 60:.0f} minutes: this start takes it over."
                )
        os.truncate(self._file, 0)
        os.pwrite(self._file, strict_json.dumps(asdict(self.holder)).encode(), 0)

    def _is_the_file(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self._file)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@dataclass(frozen=True)
class Home:
    """A run's folder, and what is to be said of whoever wrote it before; empty where there is nothing."""

    folder: Path
    note: str = ""


@contextmanager
def one_writer(preset: str, config: Config, launch: "Launch") -> Iterator[Home]:
    """The run's folder, which no other process writes while this is open. Rank 0 is the one that writes.

    Raises ValueError where another process trains there, or the folder cannot be written.
    """
    name = config.name or f"{preset}-{launch.strategy}-{launch.world_size}x-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.out) / name
    if launch.rank:
        yield Home(folder)
        return
    died = status(folder) == DIED
    lock = Lock(folder)
    try:
        yield Home(folder, lock.note or (f"{folder}: the run before this one ended without a word" if died else ""))
    finally:
        lock.release()


def holder(folder: Path) -> Holder | None:
    """The living process that writes this run's folder; None where there is none."""
    found = _read(folder / LOCK)
    return found if found and found.lives(folder / LOCK) else None


def status(folder: Path) -> str | None:
    """How a run stands, for whoever reads its folder: what summary.json says; 'died' where that is 'running', or a
    move to another history was not completed, and the process is gone. None where there is no run.
    """
    try:
        said = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(said, str):
        return None
    history = read_history(folder)
    running = said == "running" or (history is not None and history.moving is not None)
    return DIED if running and not holder(folder) else "running" if running else said


def _flock(file: int) -> bool | None:
    """Whether another process holds it; None where there are no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a network file system without locks
        return None
    return False


def _busy(folder: Path, who: Holder | None, quiet: float = 0.0) -> UserError:
    elsewhere = (
        f" (its last sign of life is {max(0.0, quiet):.0f} s old; {SILENCE / 60:.0f} minutes after it a start takes "
        f"the folder over; if you know that it is gone, remove {LOCK} there)"
    )
    return UserError(
        f"{folder} is being trained by {who or 'another process'}; wait for it or give another --name"
        f"{'' if who is None or who.is_near else elsewhere}."
    )


def _read(path: Path) -> Holder | None:
    """Who a lock file names, None where it is none of ours. One that has just been made may be empty for a moment."""
    for _ in range(5):
        try:
            found: Any = json.loads(path.read_bytes())
            holder = Holder(**found)
            if all(isinstance(text, str) for text in (holder.host, holder.space, holder.started)):
                time.localtime(holder.since + 0 * int(holder.pid))  # numbers, and a moment
                return holder
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, OverflowError, RecursionError):
            pass
        time.sleep(0.02)
    return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time, where there is no flock: a file that only one can make. It is there for milliseconds."""
    claim = path.with_name(f"{path.name}.claim")
    deadline = time.monotonic() + CLAIM
    while True:
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL, 0o644))
            break
        except FileExistsError:
            if time.monotonic() > deadline:  # whoever made it was killed then
                claim.unlink(missing_ok=True)
                deadline = time.monotonic() + CLAIM
            time.sleep(0.01)
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def _space() -> str:
    """Of process numbers: the container's, by the kernel's own name for it; empty where there is no Linux."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process began, in words that no other process of this host with that number has; None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except OSError:
        pass
    else:
        return None if fields[0] in "ZX" else f"{boot} {fields[19]}"
    import psutil  # no Linux

    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.Error:
        return None
