"""Every number of small runs under every strategy, hashed: the proof that a change of form has changed no number.

    python -m tests.speedrun.numbers > before.txt     # and after the change again: the two are equal
    python -m tests.speedrun.numbers zero3            # one strategy alone

Hashes are of one machine and its libraries. A line: the strategy, the run, the hash of its metrics.jsonl without times,
the hash of its ledger.json.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speedrun.config import CheckpointConfig, Config, DataConfig
from strategies.base import Precision
from tests.ranks import RankPool
from tests.rehearsal.rehearse import small as shrunk
from tests.speedrun.runs import STRATEGIES, in_folder, small, train_here

TIMES = ("train_time_ms", "step_avg_ms", "data_time_ms", "compute_time_ms", "tokens_per_second")

SAVED = "saved"
"""The run whose checkpoint of step 4 another one goes on from."""


def runs(folder: Path) -> Iterator[tuple[str, Config, Precision]]:
    """Name, configuration and precision of every run, in an order in which they can be made. folder: of the runs."""
    for preset in ("tiny", "gpt2", "modern", "speedrun"):
        yield preset, shrunk(preset, 2, {}), "fp32"
    yield "tiny in bf16", shrunk("tiny", 2, {}), "bf16"
    data = DataConfig(sequence_length=32, global_batch=12, micro_batch=3, eval_tokens=320)
    yield "micro-batches", small(data=data, steps=7, eval_every=3, books_every=1, untimed_steps=2), "fp32"
    optimizer = dataclasses.replace(small().optimizer, name="adamw", adamw_lr=3.0)
    skips = dict(optimizer=optimizer, on_nonfinite="skip", spike=1.05, data=data)
    yield "spikes that are left out", small(steps=24, eval_every=0, **skips), "fp32"
    yield "a target and a budget", small(steps=9, tokens=12 * 32 * 8, target_val_loss=4.7, data=data), "fp32"
    saving = dict(checkpoint=CheckpointConfig(every=2), untimed_steps=1)
    yield SAVED, small(steps=4, **saving), "fp32"
    yield "resumed", small(steps=9, resume=str(folder / SAVED / "run"), **saving), "fp32"


def hash_of(lines: Any) -> str:
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


def without_times(text: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of their times only whether there is one."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: value is None if key in TIMES else value for key, value in line.items()} for line in lines]


def main() -> None:
    """Arguments: strategies, else all."""
    pool = RankPool()
    for strategy in sys.argv[1:] or ["single", *STRATEGIES]:
        with tempfile.TemporaryDirectory() as folder:
            for name, config, precision in runs(Path(folder)):
                out = Path(folder) / name
                pool.run(1 if strategy == "single" else 2, train_here, strategy, in_folder(config, out), precision)
                numbers = hash_of(without_times((out / "run/metrics.jsonl").read_text()))
                ledger = hash_of(json.loads((out / "run/ledger.json").read_text()))
                print(f"{strategy:<7} {name:<25} {numbers} {ledger}", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
