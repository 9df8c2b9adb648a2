"""The recording of a presentation: `presentation.jsonl` in its folder, an event per line, in the order of showing.

    {"kind": "lesson", "schema": 1, "number": 5, …}            first
    {"kind": "output", "command": …, "text": …, "figures": …}  what demo.py printed; its pictures lie beside this file
    {"kind": "guess", "guess": …}                              where one was typed, before the output
    {"kind": "run",  "at": …, "command": …, "strategy": …}     the training run, where there is one
    {"kind": "whole", "at": …, "memory": {…}}                  what DDP would hold, where the run is of another strategy
    {"kind": "step", "at": …, "step": …, "train_loss": …}      a line of its metrics.jsonl
    {"kind": "books", "at": …, "step": …, "ranks": […]}        its ledger.json, whenever that was written
    {"kind": "end"}                                            last; without it the recording was cut off

`at` is in seconds since the training run was started. A replay needs nothing but this and the lesson's README.md.
"""

import json
import time
from pathlib import Path
from typing import Any

from strategies import strict_json
from strategies.errors import UserError

NAME = "presentation.jsonl"
EARLIER_NAME = "demo.jsonl"
"""Of recordings from before the verb had its name."""
SCHEMA = 1

Event = dict[str, Any]


class Recorder:
    """Writes a new recording; every event is on the disk when `add` returns."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self._file = open(folder / NAME, "w", encoding="utf-8")  # noqa: SIM115  open as long as it is shown

    def add(self, event: Event) -> Event:
        self._file.write(strict_json.dumps(event) + "\n")
        self._file.flush()
        return event


def new_folder(out: Path, lesson: str) -> Path:
    """Where a presentation of this lesson that starts now is recorded."""
    return out / f"present-{lesson}-{time.strftime('%Y%m%d-%H%M%S')}"


def find_recording(run: str, out: Path) -> Path:
    """The folder of a recording, by its path or its name in `out`. Raises FileNotFoundError where there is none."""
    places = [Path(run), out / run]
    if Path(run).name in (NAME, EARLIER_NAME):
        places.insert(0, Path(run).parent)
    for place in places:
        if (place / NAME).is_file() or (place / EARLIER_NAME).is_file():
            return place
    for place in places:
        if (place / "metrics.jsonl").is_file():
            raise FileNotFoundError(f"{place} is a run of the trainer, not of shardrun present: it has no {NAME}.")
    raise FileNotFoundError(
        f"there is no recording in {places[0]}; shardrun present N makes one and ends with the name of its folder."
    )


def read_recording(folder: Path) -> list[Event]:
    """All events. Raises ValueError for a recording that is cut off, or is none."""
    path = folder / NAME if (folder / NAME).is_file() else folder / EARLIER_NAME
    events: list[Event] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "kind" not in event:
                raise UserError(line)
        except ValueError:
            what = "ends in the middle of" if number == len(lines) else "cannot be read at"
            raise UserError(f"{path} {what} line {number}; record it again without --replay.") from None
        events.append(event)
    if not events or events[0]["kind"] != "lesson" or events[0].get("schema") != SCHEMA:
        raise UserError(f"{path} is no recording of a presentation (schema {SCHEMA}).")
    if events[-1]["kind"] != "end":
        raise UserError(
            f"{path} breaks off after line {len(lines)}: it was ended before its last step; record it again."
        )
    return events
