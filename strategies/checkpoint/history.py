"""To which history of a run a checkpoint belongs.

A run that goes back to an earlier step of its own is another history from there on: with an id of its own, and with a
parent, (id, step). `history.json` in the run's folder says which history its record tells. The index of a checkpoint
says in which history it was saved. A checkpoint counts where that is the run's own history, or an ancestor's up to the
step that the two have in common. "The newest" is the newest of those that count, and not the highest number.

    {"schema": 1, "id": "5f0c…", "parent": {"id": "a41b…", "step": 4}, "ancestors": {"a41b…": 4},
     "moving": {"from": "a41b…", "beyond": 4}, "wandb": {"id": "5f0c…", "step": 12}}

`moving` stands there from the moment in which a run goes back until all that does not count any more is set aside: who
finds it, after a kill, completes that. Folders of older versions have no history.json, and all in them counts.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strategies import strict_json
from strategies.checkpoint.disk import replace_synced
from strategies.checkpoint.format import INDEX
from strategies.errors import UserError
from strategies.output import why

FILE = "history.json"
SCHEMA = 1
ID = re.compile(r"[0-9a-z]{1,64}")
"""It becomes a folder's name."""


def new_id() -> str:
    """Eight hexadecimal digits: Weights & Biases takes it as a run's id too."""
    return os.urandom(4).hex()


@dataclass(frozen=True)
class Moving:
    """A move that may not be complete yet: `since` is the history that was left at the step `beyond`."""

    since: str
    beyond: int


@dataclass(frozen=True)
class History:
    """Of a run. `parent`: {"id", "step"}, and "run" where it is another folder's; None where it began from nothing."""

    id: str
    parent: dict[str, Any] | None = None
    ancestors: dict[str, int] = field(default_factory=dict)
    """Id → up to which step that history is a part of this one. Those of this folder."""
    moving: Moving | None = None
    wandb: dict[str, Any] | None = None
    """The id there, and the last step that it has, of a run that was logged to Weights & Biases."""

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of its history."""
        return {"id": self.id, "parent": self.parent, "ancestors": self.ancestors}

    def counts(self, checkpoint: Path, step: int) -> bool:
        """Whether a checkpoint is of this history. One that does not say, old or damaged, is, if it may stay here."""
        saved_in = history_of(checkpoint).get("id")
        if saved_in is None:
            return self.moving is None or step <= self.moving.beyond
        return saved_in == self.id or step <= self.ancestors.get(saved_in, -1)


def history_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's index says of its history; empty where it says nothing, or cannot be read."""
    try:
        found = json.loads((checkpoint / INDEX).read_bytes())["run"]["history"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if _is_about(found) else {}


def _is_about(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and _is_id(found.get("id"))
        and isinstance(found.get("ancestors"), dict)
        and all(type(step) is int for step in found["ancestors"].values())
        and (found.get("parent") is None or isinstance(found["parent"], dict))
    )


def _is_id(found: Any) -> bool:
    return isinstance(found, str) and ID.fullmatch(found) is not None


def read_history(run: Path) -> History | None:
    """Of a run's folder; None where there is none. Raises ValueError where the file is not as it was written
    or cannot be read."""
    path = run / FILE
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({why(error)}): mend that, and start again.") from error
    except (ValueError, RecursionError):
        found = None
    moving = found.get("moving") if isinstance(found, dict) else None
    fits = moving is None or (
        isinstance(moving, dict) and _is_id(moving.get("from")) and type(moving.get("beyond")) is int
    )
    if not _is_about(found) or not fits or not isinstance(found.get("wandb"), dict | None):
        raise UserError(f"{path} is damaged; remove it, and every checkpoint in {run} counts.")
    at = Moving(moving["from"], moving["beyond"]) if moving else None
    return History(found["id"], found.get("parent"), found["ancestors"], at, found.get("wandb"))


def write_history(run: Path, history: History) -> None:
    """Through to the disk, in one move."""
    content = asdict(history)
    if history.moving:
        content["moving"] = {"from": history.moving.since, "beyond": history.moving.beyond}
    replace_synced(run / FILE, (strict_json.dumps({"schema": SCHEMA, **content}, indent=1) + "\n").encode())
