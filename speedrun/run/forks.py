"""Which history of its folder a start goes on with, and how what that leaves behind is set aside.

Going on from the newest checkpoint goes on with the history. Going back to an earlier one is a fork: a new history,
whose parent is the step that it left. Then the checkpoints beyond that step move to checkpoints/set_aside/ID, ID being
the history that is left, and with them a copy of its whole record; the run's own record is cut. Nothing is deleted, and
a kill at any moment leaves what the next start completes: history.json is written first, and decides what counts.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies import strict_json
from strategies.checkpoint.disk import replace_synced
from strategies.checkpoint.folder import ASIDE, arrange, checkpoints, name_of, of_history
from strategies.checkpoint.history import History, Moving, history_of, new_id, read_history, write_history

if TYPE_CHECKING:  # it needs torch, and what only reads a run's folder does not
    from speedrun.run.checkpoints import Resumed

METRICS = "metrics.jsonl"
OF_ONE_HISTORY = ("ledger.json", "record.txt", "curves.png")
"""What a new history makes anew, and has not where it does not come so far."""

RECORD = (*OF_ONE_HISTORY, "summary.json", "config.json", "environment.json", METRICS)
"""What is copied beside the checkpoints that are set aside; the last one says that all are there."""


def holds_run(folder: Path) -> bool:
    """Whether a folder has a run's record, or checkpoints."""
    return (folder / METRICS).exists() or bool(checkpoints(folder / "checkpoints"))


def history_of_start(folder: Path, resumed: "Resumed | None") -> History:
    """The history that a start goes on with or begins. Changes nothing.

    folder: the run's; resumed: what was asked for, None for a run from the beginning.
    """
    if resumed is None or resumed.continues is None:
        return History(new_id(), _parent(resumed))
    now = read_history(folder)
    if resumed.index is None or resumed.folder is None:  # it has not saved so far, and begins again
        recorded = any(line["step"] for line in lines_up_to(folder / METRICS)) or checkpoints(folder / "checkpoints")
        return History(new_id(), moving=Moving(now.id if now else new_id(), -1) if recorded else None)
    step, now = resumed.index.step, now or History(new_id())
    if now.counts(resumed.folder, step) and max(of_history(folder / "checkpoints"), default=0) <= step:
        return now
    saved = history_of(resumed.folder) or now.about()
    ancestors = {**saved["ancestors"], saved["id"]: step}
    return History(new_id(), {"id": saved["id"], "step": step}, ancestors, Moving(now.id, step))


def _parent(resumed: "Resumed | None") -> dict[str, Any] | None:
    """Of a run that begins with another folder's checkpoint."""
    if resumed is None or resumed.folder is None or resumed.index is None:
        return None
    return {"id": history_of(resumed.folder).get("id"), "step": resumed.step, "run": str(resumed.folder)}


def take_up(folder: Path, history: History) -> tuple[History, str]:
    """Make the folder that of this history, and complete what a killed start has begun of that. Returns the history as
    it is then, and a line that says what was set aside; empty where nothing was.
    """
    before, line = read_history(folder), ""
    if before and before.moving and before.id != history.id:
        _move(folder, before)
    if before is None or before.id != history.id:
        write_history(folder, history)
    if history.moving or not all(
        history.counts(path, step) for step, path in checkpoints(folder / "checkpoints").items()
    ):
        history, line = _move(folder, history)
    return history, line


def _move(folder: Path, history: History) -> tuple[History, str]:
    line = ""
    if moving := history.moving:
        _move_record(folder, history, moving)
    moved = arrange(folder / "checkpoints", history)
    write_history(folder, replace(history, moving=None))
    if moving or moved:
        where = folder / "checkpoints" / ASIDE / (moving.since if moving else "")
        names = ", ".join(sorted({name_of(int(path.name.split("_")[1].split("-")[0])) for path in moved}))
        what = f"{names or 'no checkpoint'}{' and a copy of the record' if moving else ''}"
        line = f"set aside in {where}: {what}; nothing there is counted or deleted from now on"
    return replace(history, moving=None), line


def _move_record(folder: Path, history: History, moving: Moving) -> None:
    """Copy the record of the history that is left, then cut the run's own to what the two have in common."""
    within = folder / "checkpoints" / ASIDE
    aside = within / moving.since
    if not (aside / METRICS).exists():
        aside.mkdir(parents=True, exist_ok=True)
        for name in RECORD:
            if (folder / name).exists():
                replace_synced(aside / name, (folder / name).read_bytes())
        if not (aside / METRICS).exists():
            (aside / METRICS).touch()
    saved_in = within / str((history.parent or {}).get("id")) / METRICS  # of one that was set aside before
    lines = lines_up_to(saved_in if saved_in.exists() else aside / METRICS, moving.beyond)
    replace_synced(folder / METRICS, "".join(strict_json.dumps(line) + "\n" for line in lines).encode())
    for name in OF_ONE_HISTORY:
        (folder / name).unlink(missing_ok=True)


def lines_up_to(path: Path, step: float = float("inf")) -> list[dict[str, Any]]:
    """The lines of a run's record up to a step; without those that are damaged."""
    return [line for line in _lines(path) if line is not None and line["step"] <= step]


def keep_damaged(path: Path) -> str:
    """Where lines of a record are damaged, keep a copy of it as it is; returns a sentence, empty where none are. The
    last line of a killed run may have been cut off in the middle: that is no damage.
    """
    damaged = _lines(path).count(None)
    if not damaged:
        return ""
    copy = path.with_name(f"{path.name}.damaged")
    while copy.exists():
        copy = copy.with_name(f"{copy.name}-again")
    replace_synced(copy, path.read_bytes())
    lines = "1 line is" if damaged == 1 else f"{damaged} lines are"
    return f"warning: {path}: {lines} damaged and left out; {copy.name} keeps the file as it was"


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """Every line of a record, None for one that is damaged."""
    lines: list[dict[str, Any] | None] = []
    *complete, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for text in (*complete, last):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        elif text is not last:
            lines.append(None)
    return lines
