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

from strategies.checkpoint.format import SUMS

NAME = re.compile(r"step_(\d{8,12})")
WRITING, REPLACED, DELETING = ".writing-", ".replaced-", ".deleting-"


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


def find_checkpoint(path: Path) -> Path:
    """A checkpoint by its own path, or the newest one of a run's folder or of a folder of checkpoints.

    Raises FileNotFoundError where there is none.
    """
    if (path / SUMS).exists() or NAME.fullmatch(path.name):
        if not path.is_dir():
            raise FileNotFoundError(f"there is no checkpoint {path}; name a folder step_NNNNNNNN, or a run's folder.")
        return path
    for folder in (path / "checkpoints", path):
        if found := checkpoints(folder):
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


def prune(folder: Path, keep: int, best: Callable[[dict[int, Path]], int | None]) -> None:
    """Delete all but the newest `keep` checkpoints and the one that `best` picks."""
    found = checkpoints(folder)
    kept = {*list(found)[-keep:], best(found)}
    for step, path in found.items():
        if step not in kept:
            leaving = folder / f"{DELETING}{path.name}"
            os.rename(path, leaving)
            shutil.rmtree(leaving, ignore_errors=True)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file through to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put a folder's entries on the disk, where the system can (Windows cannot open folders)."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
