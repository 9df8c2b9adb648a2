"""What a step waits for its data: `data_time_ms` beside `compute_time_ms`, and what a batch costs without the thread.

    python -m benchmarks.data_time                  # some minutes on two cores
    python -m benchmarks.data_time --out FILE.md    # also write the tables

First the trainer (tiny, two ranks), in pairs of runs that differ in source and vocabulary only: .bin shards of GPT-2
tokens, and the embedded corpus as bytes. Batches are made in a background thread, so a step should wait for the
hand-over and no more; aim: under a tenth of the compute time.

Then what the thread does in a step of `speedrun`, in this process and with nothing beside it: the rows of one of 8
ranks, and of all, out of a shard of 100M tokens. On a GPU a step must take longer than this, or it waits for its data.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shardrun.launch import launch, shipped_config, what_went_wrong
from speedrun.config import DataConfig
from speedrun.data import open_data
from speedrun.data.shards import GPT2_DOCUMENT_START, write_tokens
from speedrun.presets import PRESETS

ROWS, LENGTH = 8, 128
MEAN_DOCUMENT = 1000
"""Tokens: about what FineWeb's documents have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="of the second table's training shard")
    parser.add_argument("--out", type=Path, help="write the tables to this Markdown file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = [*_waits(Path(folder), arguments.pairs, arguments.steps), ""]
        lines += _costs(Path(folder), arguments.shard_tokens)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text(f"# What a step waits for its data\n\n{(chr(10)).join(lines)}\n")


def _waits(folder: Path, pairs: int, steps: int) -> Iterator[str]:
    """The first table: the trainer on both sources."""
    shards = _random_shards(folder / "small", 2_000_000)
    sources = {".bin shards": [str(shards), "--model.vocab-size", "50257"], "embedded corpus": ["pydocs"]}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for number in range(pairs):
        for name, source in sources.items():
            times[name].append(_run(folder / f"{number} {name}", source, steps))
    yield f"{pairs} pairs of {steps} steps of tiny, {ROWS}×{LENGTH} tokens, two ranks, fp32, {os.cpu_count()} cores;"
    yield "medians of a run's steps, the first fifth left out, then medians over the runs; load average at their end:"
    yield f"{os.getloadavg()[0]:.1f}. With GPT-2's vocabulary nearly all of a step on a CPU is the head.\n"
    yield "| source | data_time_ms | compute_time_ms | ratio, median of runs | highest |"
    yield "|---|---|---|---|---|"
    for name, runs in times.items():
        data, compute = zip(*runs, strict=True)
        ratios = [wait / work for wait, work in runs]
        yield (
            f"| {name} | {statistics.median(data):.2f} | {statistics.median(compute):.0f} "
            f"| {statistics.median(ratios):.5f} | {max(ratios):.5f} |"
        )


def _run(folder: Path, source: list[str], steps: int) -> tuple[float, float]:
    """Median data and compute time of a step in ms."""
    folder.mkdir()
    options = ["--steps", str(steps), "--eval-every", "0", "--data.eval-tokens", "1024", "--data.source", *source]
    options += ["--data.global-batch", str(ROWS), "--data.sequence-length", str(LENGTH)]
    options += ["--out", str(folder), "--name", "run"]
    log = folder / "log.txt"
    if launch(shipped_config("cpu/ddp"), "speedrun.train", ["tiny", *options], ["--num_processes", "2"], log):
        raise SystemExit(what_went_wrong(log))
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][1 + steps // 5 :]
    metrics = [line for line in lines if not line.get("counted")]
    return (
        statistics.median(line["data_time_ms"] for line in metrics),
        statistics.median(line["compute_time_ms"] for line in metrics),
    )


def _costs(folder: Path, shard_tokens: int) -> Iterator[str]:
    """The second table: making the batches of `speedrun`, without a thread and without training."""
    record = PRESETS["speedrun"][1].data
    shards = _random_shards(folder / "large", shard_tokens)
    config = DataConfig(
        source=str(shards),
        sequence_length=record.sequence_length,
        global_batch=record.global_batch,
        eval_tokens=record.sequence_length,
    )
    data = open_data(config, 50257, seed=0)
    started = time.perf_counter()
    data.batch(0, 0, 1)
    first = time.perf_counter() - started
    yield f"`speedrun`: {record.global_batch} rows of {record.sequence_length} tokens a step, from a shard of"
    yield f"{shard_tokens:,} tokens; medians of 20 steps. A shard's first batch takes {first:.2f} s (its documents are"
    yield "found and shuffled), once per shard.\n"
    yield "| rows | ms a step | million tokens/s |"
    yield "|---|---|---|"
    for rows in (record.global_batch // 8, record.global_batch):
        times = []
        for step in range(1, 21):
            started = time.perf_counter()
            data.batch(step, 0, rows)
            times.append(time.perf_counter() - started)
        median = statistics.median(times)
        yield f"| {rows} | {median * 1e3:.1f} | {rows * record.sequence_length / median / 1e6:.0f} |"


def _random_shards(folder: Path, tokens: int) -> Path:
    """A training shard and a validation shard of random tokens, with documents of about MEAN_DOCUMENT tokens."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("random_train_000001.bin", tokens), ("random_val_000000.bin", 10_000)):
        content = rng.integers(0, GPT2_DOCUMENT_START, size, dtype=np.uint16)
        content[rng.integers(0, size, size // MEAN_DOCUMENT)] = GPT2_DOCUMENT_START
        content[0] = GPT2_DOCUMENT_START
        write_tokens(folder / name, content)
    return folder


if __name__ == "__main__":
    main()
