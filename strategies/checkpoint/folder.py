"""A folder of checkpoints, in which each is complete or not there.

A checkpoint is written under a hidden name and gets its own, step_NNNNNNNN, by a rename when every byte of it is on the
disk; and it loses that name, by a rename, before the first byte of it is deleted. A kill at any moment leaves hidden
folders, which nothing reads and the next run clears away.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from strategies.checkpoint.disk import sync_folder
from strategies.checkpoint.format import SUMS
from strategies.checkpoint.history import History, history_of, read_history

NAME = re.compile(r"step_(\d{8,12})")
WRITING, REPLACED, DELETING = ".writing-", ".replaced-", ".deleting-"
ASIDE = "set_aside"


def name_of(step: int) -> str:
    """The folder's name for a checkpoint after so many steps."""
    return f"step_{step:08d}"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Step → folder of every checkpoint, the oldest first."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := NAME.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def of_history(folder: Path) -> dict[int, Path]:
    """Step → folder of every checkpoint that is of the run's history, the oldest first.

    folder: of the checkpoints, in the folder of the run, whose history.json says which those are. Raises ValueError
    where that is damaged.
    """
    history = read_history(folder.parent)
    places = list(checkpoints(folder).items())
    if history is None:
        return dict(places)
    if history.moving:  # some that count may not be back yet
        places += [(step, path) for _, step, path in set_aside(folder) if history_of(path)]
    return dict(sorted((step, path) for step, path in places if history.counts(path, step)))


def set_aside(folder: Path) -> list[tuple[str, int, Path]]:
    """The history's id, the step and the folder of every checkpoint that was set aside."""
    within = sorted((folder / ASIDE).iterdir()) if (folder / ASIDE).is_dir() else []
    return [(one.name, step, path) for one in within for step, path in checkpoints(one).items()]


def arrange(folder: Path, history: History) -> list[Path]:
    """Set aside every checkpoint that is not of this history, and bring back those that are; returns where to.

    By renames: a kill between two of them leaves nothing in two places or in none, and whoever calls it again goes on.
    One process calls this while no other one writes.
    """
    moved = []
    for step, path in checkpoints(folder).items():
        if not history.counts(path, step):
            since = history.moving.since if history.moving else history.id
            target = folder / ASIDE / history_of(path).get("id", since) / path.name
            while target.exists():
                target = target.with_name(f"{target.name}-again")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, target)
            sync_folder(target.parent)
            moved.append(target)
    for _, step, path in set_aside(folder):
        if history_of(path) and history.counts(path, step) and not (folder / path.name).exists():
            os.rename(path, folder / path.name)
    sync_folder(folder)
    return moved


def find_checkpoint(path: Path) -> Path:
    """A checkpoint by its own path, or the newest one of a run's folder or of a folder of checkpoints: of those that
    are of the run's history.

    Raises FileNotFoundError where there is none, ValueError where the run's history.json is damaged.
    """
    if (path / SUMS).exists() or NAME.fullmatch(path.name):
        if not path.is_dir():
            raise FileNotFoundError(f"there is no checkpoint {path}; name a folder step_NNNNNNNN, or a run's folder.")
        return path
    for folder in (path / "checkpoints", path):
        if found := of_history(folder):
            return list(found.values())[-1]
    raise FileNotFoundError(f"there is no checkpoint in {path}; name a folder step_NNNNNNNN, or a run's folder.")


def publish(written: Path, step: int) -> Path:
    """Give a written checkpoint its name; returns the folder. Its files are on the disk already.

    One of the same step that is there gives way: for the moment between two renames neither has the name, and `clear`
    gives it back to the old one if that moment was the last.
    """
    target = written.parent / name_of(step)
    replaced = written.parent / f"{REPLACED}{target.name}"
    sync_folder(written)
    if target.exists():
        os.rename(target, replaced)
    os.rename(written, target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def clear(folder: Path) -> None:
    """Clear away what a killed run has left under hidden names. One process calls this while no other one writes."""
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(REPLACED) and not (folder / path.name.removeprefix(REPLACED)).exists():
            os.rename(path, folder / path.name.removeprefix(REPLACED))
        elif path.name.startswith((WRITING, REPLACED, DELETING)):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int, best: Callable[[dict[int, Path]], int | None], published: int) -> None:
    """Delete all but the newest `keep` checkpoints, the one that `best` picks and the one just published.

    One that somebody has put here and that is of a later step than the published one is not ours to count or delete.
    """
    found = {step: path for step, path in checkpoints(folder).items() if step <= published}
    kept = {*list(found)[-keep:], best(found), published}
    for step, path in found.items():
        if step not in kept:
            leaving = folder / f"{DELETING}{path.name}"
            os.rename(path, leaving)
            shutil.rmtree(leaving, ignore_errors=True)
