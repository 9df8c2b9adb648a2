"""Whether anything is left to train of a run that is to go on: steps, tokens or target may be reached already."""

import json
from pathlib import Path
from typing import Any

from speedrun.config import Config
from speedrun.stages import number_of_steps
from strategies.checkpoint.format import Index
from strategies.errors import UserError


def done_with(checkpoint: Path, index: Index, config: Config, run: Path | None) -> str:
    """The sentence about a run that goes on from a checkpoint and has nothing left to train; empty where it has.

    run: its folder, where this is its newest checkpoint. There the summary has to say 'finished' too: one that was
    killed just after its last save still gets its end. Raises ValueError where the checkpoint is beyond the end.
    """
    where = run or checkpoint
    _refuse_beyond(where, index.step, config)
    if run and _summary(run).get("status") != "finished":
        return ""
    return _sentence(where, index.step, index.run["metrics"].get("val_loss"), config)


def done_without(run: Path, config: Config) -> str:
    """The same of a run without checkpoints, by its summary."""
    summary = _summary(run)
    if summary.get("status") != "finished" or not isinstance(summary.get("step"), int):
        return ""
    _refuse_beyond(run, summary["step"], config)
    return _sentence(run, summary["step"], summary.get("val_loss"), config)


def _refuse_beyond(where: Path, step: int, config: Config) -> None:
    steps = number_of_steps(config)
    if step > steps:
        asked = f"--steps {steps}" if steps == config.steps else f"the {steps} of --tokens {config.tokens}"
        raise UserError(
            f"{where} holds {step} steps already, more than {asked}: ask for more, or go back to an earlier checkpoint "
            "with --resume PATH."
        )


def _sentence(where: Path, step: int, val_loss: Any, config: Config) -> str:
    target, more = config.target_val_loss, "--steps N"
    if target is not None and isinstance(val_loss, int | float) and val_loss <= target:
        why = f"it reached the target validation loss {target} at step {step} ({val_loss:.4f})"
        more = "a lower --target-val-loss"
    elif step == number_of_steps(config):
        why = f"it holds all {step} steps that are asked for"
    else:
        return ""
    return f"{where} is done: {why}. Nothing was trained and nothing changed; {more} goes on to more."


def _summary(run: Path) -> dict[str, Any]:
    try:
        found = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def lies_in(checkpoint: Path, run: Path) -> bool:
    """Whether a checkpoint is one of a run's folder, by whatever path it is named, links included."""
    own = [place for place in (run, run / "checkpoints") if place.is_dir()]
    parents = {*checkpoint.resolve().parents, checkpoint.absolute().parent.resolve()}
    return any(parent.samefile(place) for parent in parents for place in own)
