"""A run's curves at Weights & Biases: one run there for each history of the run's folder.

The id is kept in history.json, so that a run that goes on, online or offline, adds to the curves that are there. A run
that goes back to an earlier step is another history, and gets another id, with its parent in its configuration: a step
never goes backwards within one id, since Weights & Biases drops what does.
"""

import dataclasses
import netrc
import os
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from speedrun.config import Config
from strategies.checkpoint.history import History, write_history
from strategies.select import Launch

FINISH = 60
"""Seconds to wait at the end for Weights & Biases to upload the rest."""

TIMEOUT = 20
"""Seconds to wait for Weights & Biases before the run goes on offline."""


class WandbRun:
    """The open run there. Whatever goes wrong with it is said, and ends nothing."""

    def __init__(self, run: Any, logged: int):
        """logged: the last step that it has already."""
        self.run, self.logged = run, logged

    def log(self, metrics: dict[str, Any]) -> None:
        """A step's metrics, where it has not had that step from an earlier part of the same history."""
        if self.run is None or metrics["step"] <= self.logged:
            return
        shown = {key: value for key, value in metrics.items() if value is not None and key != "step"}
        try:
            self.run.log(shown, step=metrics["step"])
        except Exception as error:  # whatever it is, the run is worth more than its curves elsewhere
            print(f"Weights & Biases stopped logging ({error}); the run goes on, and its folder holds everything.")
            self.run = None

    def finish(self, exit_code: int) -> None:
        """Send what has not been sent; a connection that is gone costs the run's end a bounded time, nothing else."""
        if self.run is None:
            return
        failures: list[Exception] = []

        def finish() -> None:
            try:
                import wandb

                self.run.finish(exit_code=exit_code)
                wandb.teardown()  # waits until wandb's own process has written everything
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=finish, name="wandb", daemon=True)
        thread.start()
        thread.join(FINISH)
        if thread.is_alive() or failures:
            why = failures[0] if failures else f"no answer in {FINISH} s"
            print(f"Weights & Biases did not get the end of this run ({why}); wandb sync sends what is kept in wandb/.")


def start_wandb(folder: Path, history: History, last: int, config: Config, launch: Launch) -> WandbRun:
    """Begin the history's run there, or go on with it, and keep its id in the folder.

    last: the last step that the folder's record had before this start, −1 for none: that is what was sent. Offline,
    with a line that says so, where there is no key or no connection; without effect where it cannot start.
    """
    try:
        import wandb
    except ImportError:
        print("wandb is not installed (pip install 'shardrun[logging]'): this run is logged to its folder only.")
        return WandbRun(None, -1)
    kept = history.wandb
    # An id of the environment (a sweep's) is somebody's wish; but not for a second history.
    wished = os.environ.get("WANDB_RUN_ID") if history.parent is None else None
    kept = {"id": kept["id"], "step": max(kept["step"], last)} if kept else {"id": wished or history.id, "step": -1}
    write_history(folder, dataclasses.replace(history, wandb=kept))
    about = {**dataclasses.asdict(config), "launch": dataclasses.asdict(launch), "parent": history.parent}
    settings: dict[str, Any] = {
        **{"project": "shardrun", "name": folder.name, "dir": config.out, "config": about},
        **{"id": kept["id"], "resume": "allow"},
    }
    if _has_key(wandb) or os.environ.get("WANDB_MODE"):
        try:
            run = wandb.init(**settings, settings=wandb.Settings(silent=True, init_timeout=TIMEOUT))
            return WandbRun(run, kept["step"])
        except Exception as error:  # wandb.Error, or what a library below it raises
            reason = str(error).partition("\n")[0]
            print(f"Weights & Biases cannot be reached ({reason}): logging offline; wandb sync sends it later.")
    else:
        print("No Weights & Biases key (wandb login, or WANDB_API_KEY): logging offline; wandb sync sends it later.")
    try:
        return WandbRun(wandb.init(**settings, mode="offline", settings=wandb.Settings(silent=True)), kept["step"])
    except Exception as error:
        print(f"Weights & Biases cannot start ({error}): this run is logged to its folder only.")
        return WandbRun(None, -1)


def _has_key(wandb: Any) -> bool:
    """Whether there is a key: in the environment, or where `wandb login` keeps it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).hostname
    try:
        return host in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
