"""The trainer with one moment of it made long, and announced: what `python -m benchmarks.signals` launches.

    … -m benchmarks.signals_rank MOMENT FILE tiny --steps 9 …

Rank 0 makes FILE when the moment begins, in which every rank then stays for some seconds. All else is the trainer.
"""

# ruff: noqa: E402  (imports after a statement, as in speedrun/train.py)
from speedrun.run.signals import catch

if __name__ == "__main__":
    catch()

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEP, SAVE = 6, 4
"""The step, from 1, in which moments of training are; and the one whose checkpoint is written slowly."""

LONG = 4.0
"""Seconds that a moment lasts; a signal comes 0.3 s after it began."""


def announce(file: Path, seconds: float = LONG) -> None:
    if os.environ.get("RANK", "0") == "0":
        file.touch()
    time.sleep(seconds)


def before(owner: Any, name: str, file: Path, when: Callable[..., bool] = lambda *_: True) -> None:
    """Stay before that function, at its first call of which `when` is true."""
    original = getattr(owner, name)
    there = [False]

    def slow(*arguments: Any, **options: Any) -> Any:
        if not there[0] and when(*arguments):
            there[0] = True
            announce(file)
        return original(*arguments, **options)

    setattr(owner, name, slow)


def main() -> None:
    moment, file = sys.argv[1], Path(sys.argv[2])
    sys.argv = [sys.argv[0], *sys.argv[3:]]
    if moment == "imports":
        announce(file)
    from speedrun import train
    from speedrun.data import Data
    from speedrun.run.checkpoints import Resumed
    from speedrun.run.context import Run
    from speedrun.run.ending import guarded
    from strategies import select
    from strategies.checkpoint import save

    now = [0]

    def note(strategy: Any, config: Any, step: int, *_: Any) -> bool:
        now[0] = step + 1
        return False

    before(train, "set_schedules", file, note)
    if moment == "start":
        before(select, "start", file)
    elif moment == "resume":
        before(Resumed, "restore", file)
    elif moment == "warm-up":
        before(train, "untimed_steps", file)
    elif moment == "compile":  # takes long by itself
        before(train, "untimed_steps", file, lambda *_: bool(announce(file, 0.0)))
    elif moment == "step":
        before(train, "accumulate", file, lambda *_: now[0] == STEP)
    elif moment == "validation":
        whole = Data.validation

        def slow(self: Data, first: int, last: int) -> Any:
            if now[0] == STEP:
                announce(file, 0.5)  # for each forward pass
            return whole(self, first, last)

        Data.validation = slow  # type: ignore[method-assign]
    elif moment == "save":
        before(save, "write_shard", file, lambda path, *_: f"{SAVE:08d}" in str(path))
    elif moment == "end":
        before(Run, "_finish", file)
    else:
        assert moment in ("imports", "none"), moment
    guarded(train.main)


if __name__ == "__main__":
    main()
