"""The record of a run with a target, in the form of the public speedrun records: one text file, and its curves.

    record.txt   the run's own source, then versions, machine and GPUs, then a line for every step
    curves.png   validation loss against time and tokens, training loss, milliseconds per step (where matplotlib is)

Both are made from what the run has left in its folder anyway, once it has ended.
"""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speedrun.run.forks import METRICS, lines_up_to
from speedrun.run.progress import describe
from strategies import strict_json
from strategies.output import utf8

RULE = "=" * 100
SOURCES = ("speedrun", "strategies")


def write_record(folder: Path, target: float) -> None:
    """folder: of a run that has ended, with metrics.jsonl, environment.json, config.json and summary.json."""
    metrics = lines_up_to(folder / METRICS)
    environment, config, summary = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("environment", "config", "summary")
    )
    root = Path(__file__).parents[2]
    parts = [
        f"# {path.relative_to(root).as_posix()}\n{path.read_text(encoding='utf-8')}"
        for package in SOURCES
        for path in sorted((root / package).rglob("*.py"))
    ]
    steps = metrics[-1]["step"]
    parts += [
        strict_json.dumps(config, indent=1),
        strict_json.dumps(environment, indent=1),
        gpus(),
        "\n".join(describe(line, steps) for line in metrics),
        _verdict(metrics, target, summary["status"]),
    ]
    (folder / "record.txt").write_bytes(utf8(f"\n{RULE}\n".join(parts) + "\n"))
    _draw(folder / "curves.png", metrics, target)


def step_times(lines: Iterable[dict[str, Any]]) -> list[float]:
    """Milliseconds of the timed steps, waiting for data included; of all where none was (a run of one or two steps).

    lines: of metrics.jsonl. A step whose books were kept is not timed.
    """
    steps = [line for line in lines if line.get("compute_time_ms") is not None]
    timed = [line for line in steps if not line.get("counted")]
    return [line["data_time_ms"] + line["compute_time_ms"] for line in timed or steps]


def gpus() -> str:
    """What nvidia-smi lists; a sentence where there is none."""
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return "no nvidia-smi here: this run was not on a GPU, or its driver's tools are not installed"


def _verdict(metrics: list[dict[str, Any]], target: float, status: str) -> str:
    validations = [line for line in metrics if line.get("val_loss") is not None]
    if not validations:
        return f"{status}, before the first validation"
    best = min(validations, key=lambda line: line["val_loss"])
    reached = next((line for line in validations if line["val_loss"] <= target), None)
    if reached is None:
        return (
            f"{status}; the target {target} was not reached: {best['val_loss']:.4f} at step {best['step']} was the best"
        )
    seconds, tokens = reached["train_time_ms"] / 1e3, reached["tokens"]
    return f"{status}; {target} reached at step {reached['step']}: {seconds:.1f} s of training, {tokens:,} tokens"


def _draw(path: Path, metrics: list[dict[str, Any]], target: float) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    validations = [line for line in metrics if line.get("val_loss") is not None]
    trained = [line for line in metrics if line.get("train_loss") is not None]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    seconds = [line["train_time_ms"] / 1e3 for line in validations]
    for axis, xs, label in (
        (axes[0], seconds, "seconds of training"),
        (axes[1], [line["tokens"] / 1e6 for line in validations], "million tokens"),
    ):
        axis.plot(xs, [line["val_loss"] for line in validations], marker="o", markersize=3, color="#0072B2")
        axis.axhline(target, color="#D55E00", linestyle="--", label=f"target {target}")
        axis.set(xlabel=label, ylabel="validation loss, nats per token")
        axis.legend(frameon=False)
    if trained:
        axes[2].plot(
            [m["step"] for m in trained], [m["train_loss"] for m in trained], color="#999999", label="train loss"
        )
        axes[2].set(xlabel="step", ylabel="training loss")
        right = axes[2].twinx()
        right.plot([m["step"] for m in trained], [m["step_avg_ms"] for m in trained], color="#009E73")
        right.set_ylabel("ms per step, mean so far", color="#009E73")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
