"""Five steps of training under each strategy, through accelerate launch, as a user starts them."""

import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shardrun.doctor.report import Finding
from shardrun.launch import launch, shipped_config, shown, what_went_wrong

STEPS = 5


def train(strategy: str, gpus: int, timeout: float, redacted: Callable[[str], str] = str) -> Iterator[Finding]:
    """Train the tiny preset, on all GPUs or on two CPU processes. What a failed run printed is kept, redacted."""
    ranks = 1 if strategy == "single" else gpus or 2
    config = shipped_config(strategy if gpus else f"cpu/{strategy}")
    options = ["--num_processes", str(ranks)]
    # A row for each rank; one validation, of a few rows, at the end.
    arguments = ["tiny", "--steps", str(STEPS), "--eval-every", "0", "--untimed-steps", "0", "--progress", "none"]
    arguments += ["--data.global-batch", str(ranks), "--data.eval-tokens", str(128 * ranks)]
    command = shown(config, "speedrun.train", arguments, options)
    folder = Path(tempfile.mkdtemp(prefix="shardrun-doctor-"))
    log = folder / "output.txt"
    started = time.perf_counter()
    try:
        status = launch(
            config, "speedrun.train", [*arguments, "--out", str(folder), "--name", "run"], options, log, timeout
        )
        wrong = _last_error(log) if status else _check(folder / "run")
    except subprocess.TimeoutExpired:
        wrong = f"it did not end within {timeout:.0f} s and was ended"
    except BaseException:  # interrupted
        shutil.rmtree(folder, ignore_errors=True)
        raise
    seconds = time.perf_counter() - started
    where = f"{ranks} GPU{'s' * (ranks > 1)}" if gpus else f"{ranks} CPU process{'es' * (ranks > 1)}"
    if wrong:
        log.write_text(redacted(log.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
        yield Finding(strategy, "failure", f"{wrong} (on {where}; all it printed: {log})", command)
    else:
        shutil.rmtree(folder)
        yield Finding(strategy, "ok", f"{STEPS} steps on {where} in {seconds:.0f} s")


def _check(run: Path) -> str:
    """What is wrong with a run that ended well, by its record; empty where nothing is."""
    status = json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"]
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = json.loads(lines[-1])["step"] if lines else 0
    return "" if (status, steps) == ("finished", STEPS) else f"its record says {status!r} after step {steps} of {STEPS}"


def _last_error(log: Path) -> str:
    """A failed run's own sentence, or the last line of its output that names an error."""
    said = what_went_wrong(log).splitlines() or ["it said nothing"]
    if len(said) == 1:
        return said[0]
    errors = [line for line in said if re.match(r"(\[rank\d+\]: )?\w*(\.\w+)*(Error|Exception)\b", line.strip())]
    return (errors or said)[-1].strip()
