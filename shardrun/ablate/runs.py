"""Training the arms: every run through the real trainer, its result kept at once, so that a comparison can be killed at
any moment and goes on where it was.

    OUT/results.json       an entry per finished run, under a key made of everything that decides what the run is
    OUT/runs/KEY-PID/      the run's own record (metrics.jsonl and so on)
    OUT/runs/KEY-PID.log   what it printed
"""

import dataclasses
import hashlib
import json
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardrun.ablate.ideas import Changes, Setting, trainer_options
from shardrun.launch import launch, what_went_wrong
from shardrun.machine import cpu_name
from speedrun.run.record import step_times
from strategies import strict_json
from strategies.errors import UserError

SCHEMA = 1

UNIMPORTANT = ("name", "out", "log", "progress")
"""Fields of a configuration that do not change what a run computes."""


@dataclass(frozen=True)
class Result:
    """One run. curve: (tokens, nats per token, seconds of training) at every validation, without the one at step 0.
    seconds, step_ms: of training, without validation; the median step."""

    label: str
    seed: int
    diverged: bool
    val_loss: float
    tokens: int
    seconds: float
    step_ms: float
    curve: list[tuple[int, float, float]]
    data_hash: str
    commit: str | None
    versions: dict[str, Any]
    machine: str
    """Kind of processor or GPU, and threads."""


class Runs:
    """The runs of one folder. `get` returns a run's result, from the file or by training it now."""

    def __init__(self, preset: str, options: list[str], setting: Setting, out: Path) -> None:
        """preset, options: of the trainer, which together make setting.config."""
        self.preset, self.options, self.setting, self.out = preset, options, setting, out
        self.file = out / "results.json"
        self.results = read(self.file)
        self.trained_seconds: list[float] = []
        """Whole durations of the runs that were trained by this call."""

    def key(self, changes: Changes, seed: int) -> str:
        """Equal for two runs that compute the same: every field, the accelerate config, the seed."""
        setting = self.setting.with_changes({**changes, "seed": seed})
        fields = {name: v for name, v in dataclasses.asdict(setting.config).items() if name not in UNIMPORTANT}
        parts = [fields, dict(sorted(setting.launch.items())), setting.accelerate.read_text(encoding="utf-8")]
        return hashlib.sha256(strict_json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def has(self, changes: Changes, seed: int) -> bool:
        return self.key(changes, seed) in self.results

    def get(self, label: str, changes: Changes, seed: int) -> Result:
        """Raises ValueError where the run failed for another reason than a loss that is not finite."""
        key = self.key(changes, seed)
        if key not in self.results:
            started = time.perf_counter()
            self._keep(key, self._train(key, label, changes, seed))
            self.trained_seconds.append(time.perf_counter() - started)
        return self.results[key]

    def _train(self, key: str, label: str, changes: Changes, seed: int) -> Result:
        # A folder of this process's own: a run that a killed process has left behind may still be starting.
        folder = self.out / "runs" / f"{key}-{os.getpid()}"
        log = folder.with_suffix(".log")
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f"{key}-*"):  # by a killed process
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        wanted = self.setting.with_changes({**changes, "seed": seed})
        trainer = [self.preset, *self.options, *trainer_options({**changes, "seed": seed})]
        trainer += ["--out", str(folder.parent), "--name", folder.name, "--progress", "none"]
        options = [part for name, value in wanted.launch.items() for part in (f"--{name}", value)]
        status = launch(wanted.accelerate, "speedrun.train", trainer, options, log)
        diverged = status != 0 and "the loss is " in what_went_wrong(log)
        if status and not diverged:
            raise UserError(f"{label}, seed {seed}, ended with status {status}: {what_went_wrong(log)} ({log}).")
        _check_it_is_the_run(folder, wanted)
        return result_of(folder, label, seed, diverged)

    def _keep(self, key: str, result: Result) -> None:
        """The file is replaced as a whole: whoever kills this process leaves the old one or the new one. What another
        process has added meanwhile is taken over."""
        self.results = {**read(self.file), **self.results, key: result}
        content = {"schema": SCHEMA, "runs": {key: dataclasses.asdict(r) for key, r in self.results.items()}}
        partial = self.file.with_suffix(".partial")
        partial.write_text(strict_json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.file)


def read(file: Path) -> dict[str, Result]:
    """The results kept in a file; none where there is no file. Raises ValueError for a file of another kind."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        assert content["schema"] == SCHEMA
        return {key: Result(**entry) for key, entry in content["runs"].items()}
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(
            f"{file} is no results file of this version of shardrun ablate: move it away, or choose another --out."
        ) from None


def result_of(folder: Path, label: str, seed: int, diverged: bool) -> Result:
    """Read a finished run's record."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    last = lines[-1]
    return Result(
        label=label,
        seed=seed,
        diverged=diverged,
        val_loss=float("inf") if diverged else last["val_loss"],
        tokens=last["tokens"],
        seconds=last["train_time_ms"] / 1e3,
        step_ms=statistics.median(step_times(lines) or [0.0]),
        curve=[(s["tokens"], s["val_loss"], s["train_time_ms"] / 1e3) for s in steps if s.get("val_loss") is not None],
        data_hash=json.loads((folder / "config.json").read_text(encoding="utf-8"))["data_hash"],
        commit=environment["commit"],
        versions={"python": environment["python"], "torch": environment["versions"]["torch"]},
        machine=", ".join(environment["gpus"]) or f"{cpu_name()}, {environment['torch_threads']} thread(s)",
    )


def _check_it_is_the_run(folder: Path, wanted: Setting) -> None:
    """The run's own record must say what was asked for, field by field."""
    recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))["run"]
    asked = json.loads(strict_json.dumps(dataclasses.asdict(wanted.config)))
    for section, name in (("model", "kernels"), ("optimizer", "orthogonalization_dtype")):
        recorded[section][name] = asked[section][name]  # `auto` is resolved in the record
    different = [name for name in asked if name not in UNIMPORTANT and recorded[name] != asked[name]]
    assert not different, f"the run in {folder} was asked for other {different} than it recorded"
