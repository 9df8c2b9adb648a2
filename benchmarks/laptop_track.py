"""The laptop track: how much sooner does `tiny` reach the loss at which a plain baseline ends?

    python -m benchmarks.laptop_track

On one machine, with the same threads, training tokens and validation targets, and as many parameters within 5 %:

1. the baseline (benchmarks/baseline.py) at each of a few peak learning rates, whole runs;
2. pairs: the baseline once more at its best rate, then `tiny` through the real trainer until its validation loss is at
   most the one at which the baseline has just ended. The ratio of their seconds is the result.

What each idea in `tiny` contributes is `shardrun ablate`'s question (benchmarks/ablation.py).

Both clocks run while a model trains and stand while it validates. The sweep is kept in the results file from one call
to the next (an entry counts only for the same data and settings), and `--sweep FILE` takes that of another results
file: which rate is best does not depend on a machine's speed. Pairs are measured anew on every call, because seconds of
different days do not compare; `--more` adds to those in the file, for one pair at a time. A pair takes a quarter of an
hour on a core of its own. A call with fewer `--iterations` is a smoke test of this script and says nothing about either
recipe. Close other programs: they slow one side of a pair.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import baseline
from shardrun.machine import cores, cpu_name
from speedrun.config import Config
from speedrun.data import Data, open_data
from speedrun.model import parameter_shapes
from speedrun.optim.precision import native_bf16
from speedrun.presets import PRESETS
from strategies import strict_json
from strategies.errors import UserError

RATES = (0.002, 0.004, 0.008)
"""The sweep, in factors of two. The best one has to lie inside, or the sweep is extended."""

EVAL_TOKENS = 131_072
"""Validation targets, in windows as long as the baseline's rows; nearly all that the corpus holds out."""

EVAL_EVERY = 10
"""Steps between validations of `tiny`: how finely the moment of reaching the target is known."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides")
    parser.add_argument("--iterations", type=int, default=baseline.ITERATIONS, help="fewer: a smoke test only")
    parser.add_argument("--pairs", type=int, default=2, help="how often baseline and tiny are timed")
    parser.add_argument("--more", action="store_true", help="add the pairs to those in the results file")
    parser.add_argument("--sweep", type=Path, help="a results file with a sweep of the same data (default: its own)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="results file (.json)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    track = Track(options.threads, options.iterations, options.out)
    if options.sweep:
        track.take_sweep(options.sweep)
    track.sweep()
    track.pairs(options.pairs, options.more)
    print(track.report())


class Track:
    """One call's measurements, and the results file that carries some of them from call to call."""

    def __init__(self, threads: int, iterations: int, out: Path) -> None:
        self.threads = threads
        self.iterations = iterations
        self.out = out
        self.preset: Config = PRESETS["tiny"][1]
        settings = dataclasses.replace(
            self.preset.data, eval_sequence_length=baseline.SEQUENCE_LENGTH, eval_tokens=EVAL_TOKENS
        )
        self.data: Data = open_data(settings, baseline.VOCAB_SIZE, self.preset.seed)
        self.validation = self.data.validation(0, self.data.validation_rows)
        self.training = torch.cat([torch.from_numpy(part.tokens.astype("int64")) for part in self.data.stream.parts])
        self.results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        self.results |= {"machine": machine(threads), "parameters": self._parameters()}
        ours, theirs = self.results["parameters"]["tiny"], self.results["parameters"]["baseline"]
        if abs(ours - theirs) > 0.05 * theirs:
            raise UserError(f"tiny has {ours:,} parameters and the baseline {theirs:,}: more than 5 % apart.")

    def take_sweep(self, other: Path) -> None:
        """The baseline's runs at each rate out of another results file."""
        self.results["sweep"] = json.loads(other.read_text(encoding="utf-8"))["sweep"]

    def sweep(self) -> None:
        """Whole baseline runs at every rate of RATES that the results file does not have yet."""
        for rate in RATES:
            if not self._find("sweep", learning_rate=rate):
                result = baseline.train(self.training, self.validation, rate, self.iterations)
                self._keep("sweep", {**self._key(), **dataclasses.asdict(result)})
        if self.best_rate() in (min(RATES), max(RATES)):
            print(f"The best rate, {self.best_rate():g}, is at the edge of the sweep: extend RATES.", file=sys.stderr)

    def best_rate(self) -> float:
        return min(self._find("sweep"), key=lambda run: run["val_loss"])["learning_rate"]

    def pairs(self, count: int, more: bool = False) -> None:
        """Baseline and `tiny` in turn, both timed; more: beside the pairs of an earlier call."""
        if not more:
            self.results["pairs"] = []
        for _ in range(count):
            theirs = baseline.train(self.training, self.validation, self.best_rate(), self.iterations)
            ours = self._tiny(theirs.val_loss)
            ratio = theirs.seconds / ours["seconds"] if ours["reached"] else None
            self._keep("pairs", {**self._key(), "baseline": dataclasses.asdict(theirs), "tiny": ours, "ratio": ratio})

    def report(self) -> str:
        """The results as Markdown; also written next to the results file."""
        text = report(self.results, self.iterations)
        self.out.with_suffix(".md").write_text(text, encoding="utf-8")
        return text

    def _tiny(self, target: float) -> dict[str, Any]:
        """A run of the real trainer in a process of its own, until the target or its last step."""
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *(sys.executable, "-m", "speedrun.train", "tiny", "--out", folder, "--name", "run"),
                *("--progress", "none", "--target-val-loss", repr(target), "--eval-every", str(EVAL_EVERY)),
                *("--data.eval-sequence-length", str(baseline.SEQUENCE_LENGTH)),
                *("--data.eval-tokens", str(EVAL_TOKENS)),
            ]
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
            subprocess.run(
                command, check=True, env=environment, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL
            )
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last = json.loads(lines[-1])
        result = {
            "reached": last["val_loss"] <= target,
            "val_loss": last["val_loss"],
            "steps": last["step"],
            "tokens": last["tokens"],
            "seconds": last["train_time_ms"] / 1e3,
        }
        print(f"tiny: {result}", flush=True)
        return result

    def _parameters(self) -> dict[str, int]:
        ours = sum(torch.Size(shape).numel() for shape in parameter_shapes(self.preset.model).values())
        return {"tiny": ours, "baseline": sum(p.numel() for p in baseline.BaselineGPT().parameters())}

    def _key(self) -> dict[str, Any]:
        return {"data_hash": self.data.content_hash, "iterations": self.iterations}

    def _find(self, section: str, **wanted: Any) -> list[dict[str, Any]]:
        wanted |= self._key()
        return [e for e in self.results.get(section, []) if all(e.get(key) == value for key, value in wanted.items())]

    def _keep(self, section: str, entry: dict[str, Any]) -> None:
        self.results.setdefault(section, []).append(entry)
        self._write()

    def _write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(strict_json.dumps(self.results, indent=1) + "\n", encoding="utf-8")


def machine(threads: int) -> dict[str, Any]:
    """What the seconds were measured on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": cores(),
        "threads": threads,
        "bf16": native_bf16(torch.device("cpu"))[1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def report(results: dict[str, Any], iterations: int) -> str:
    """results: the content of the results file, with at least one pair. Returns Markdown."""
    sweep = [run for run in results["sweep"] if run["iterations"] == iterations]
    pairs = results["pairs"]
    here, parameters = results["machine"], results["parameters"]
    best = pairs[0]["baseline"]
    ratios = [pair["ratio"] for pair in pairs if pair["ratio"]]
    headline = (
        f"**`tiny` reaches the baseline's final loss, {best['val_loss']:.4f} nats per token, "
        f"{statistics.median(ratios):.1f} times sooner.**"
        if len(ratios) == len(pairs)
        else "**`tiny` does not reach the baseline's final loss.**"
    )
    lines = [
        "# The laptop track",
        "",
        headline,
        "",
        f"Written by `python -m benchmarks.laptop_track --threads {here['threads']}` on {here['date']}: {here['cpu']} "
        f"({here['bf16']}), {here['threads']} thread(s), torch {here['torch']}, Python {here['python']}. Validation: "
        f"{EVAL_TOKENS:,} held-out tokens in windows of {baseline.SEQUENCE_LENGTH}. Parameters: "
        f"{parameters['tiny']:,} and {parameters['baseline']:,} (baseline). Seconds are of training alone.",
        "",
    ]
    if iterations != baseline.ITERATIONS:
        lines += [f"A smoke test of {iterations} iterations: these figures say nothing about either recipe.", ""]
    lines += ["## Pairs", "", "| | steps | tokens | val loss | seconds | ms/step |", "|---|---:|---:|---:|---:|---:|"]
    for pair in pairs:
        theirs, ours = pair["baseline"], pair["tiny"]
        tokens = theirs["iterations"] * baseline.ROWS * baseline.SEQUENCE_LENGTH
        lines.append(_row(f"baseline, lr {theirs['learning_rate']:g}", theirs["iterations"], tokens, theirs))
        lines.append(_row("tiny", ours["steps"], ours["tokens"], ours))
    lines += ["", "Ratios of the seconds: " + ", ".join(f"{ratio:.2f}" for ratio in ratios) + ".", ""]
    lines += ["## The baseline's learning rate", "", "| peak | val loss after all iterations |", "|---:|---:|"]
    lines += [f"| {run['learning_rate']:g} | {run['val_loss']:.4f} |" for run in sorted(sweep, key=_learning_rate)]
    return "\n".join(lines) + "\n"


def _row(name: str, steps: int, tokens: int, run: dict[str, Any]) -> str:
    seconds = run["seconds"]
    return f"| {name} | {steps} | {tokens:,} | {run['val_loss']:.4f} | {seconds:.1f} | {seconds / steps * 1e3:.0f} |"


def _learning_rate(run: dict[str, Any]) -> float:
    return run["learning_rate"]


if __name__ == "__main__":
    main()
