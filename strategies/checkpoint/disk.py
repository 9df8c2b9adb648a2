"""Files and folders written through to the disk, whole or not at all."""

import os
from pathlib import Path


def write_synced(path: Path, content: bytes) -> None:
    """Write a file through to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, content: bytes) -> None:
    """Write a file through to the disk in the place of the one that is there, in one move."""
    partial = path.with_name(f".{path.name}.partial")
    write_synced(partial, content)
    os.replace(partial, path)
    sync_folder(path.parent)


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
