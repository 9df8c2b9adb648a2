"""What a process says when it ends: one sentence, once per machine, where a person looks last.

torchrun (which is inside accelerate launch) ends all ranks as soon as one ends with an error, and closes with a summary
of what each left in a file. So a sentence goes to both places: printed by whichever rank has it first, and the file,
for the last line of that summary. A single process has no torchrun: there accelerate launch itself prints a traceback
after whatever ended with a status that is not 0, unless it is told --quiet, as the shipped single*.yaml tell it. So the
sentence waits until the launcher has ended.

Standard library only: it may be needed while torch is still being imported.
"""

import hashlib
import os
import select
import sys
import time
import warnings
from pathlib import Path

from strategies import strict_json

LAUNCHER_ENDS = 10.0
"""Seconds within which accelerate launch ends after its one process."""


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


def another_has_spoken(message: str) -> bool:
    """Whether a rank of this machine has something else than this to say, in this attempt of torchrun's."""
    said = _said()
    if said is None or not said.is_dir():
        return False
    ours = {_hash(message), _hash(f"left: {message}")}
    return any(path.is_file() and path.name not in ours for path in said.iterdir())


def leave_for_torchrun(message: str) -> None:
    """torchrun prints this as the rank's traceback in its closing summary. Ranks of a machine that have the same to say
    leave it once."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and _first(f"left: {message}"):
        # A second early: the summary ends with the earliest failure, and who is ended for this one has no file.
        details = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()) - 1)}}
        with open(path, "w", encoding="utf-8") as file:
            file.write(strict_json.dumps({"message": details}))


def _said() -> Path | None:
    """The folder in which ranks of this machine mark what has been said; None without torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")  # …/attempt_0/RANK/error.json
    return Path(path).parents[1] if path else None


def _hash(what: str) -> str:
    return hashlib.sha256(what.encode()).hexdigest()


def _first(what: str) -> bool:
    """Whether no other rank of this machine has asked this before, in this attempt of torchrun's."""
    said = _said()
    if not said:
        return True
    try:
        (said / _hash(what)).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True
