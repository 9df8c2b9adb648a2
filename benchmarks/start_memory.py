"""What a rank's process takes of host memory until its first step is done: against its shards and the largest block.

    python -m benchmarks.start_memory                      # half a billion parameters on 4 ranks, a quarter of an hour
    python -m benchmarks.start_memory --layers 4           # smaller, for a look
    python -m benchmarks.start_memory --out FILE.md [--before RESULT.json]   # also write the table

Every line is a launch of the trainer (benchmarks/start_memory_rank.py): from the beginning, with a validation before
its first step, and again from the checkpoint that it left. The peak is the kernel's own figure (VmHWM), from the moment
before the model is made to the end of the first step's update, less what the process had then. A resumed process takes
an untimed step before it loads, so that all states are there when the checkpoint is read, and then the first step.

The limit is what the rank's shards take by the books, all states and gradients together and DeepSpeed's bucket with
them, and the largest block, whole, in float32; and 0.5 GiB for all else: activations, gloo's copies of what it sends
(which NCCL does not make). DeepSpeed gets small buckets and sub-groups, since its own defaults (5e8 and 1e9 elements)
are as large as the model. glibc's allocator is told to give back what is let go (MALLOC_MMAP_THRESHOLD_): by default it
keeps freed tensors of up to 32 MiB in its heap, in pieces that nothing larger fits into.

--json FILE keeps the figures; --before FILE puts those of another version into the table, measured by this same script
(with --until prepare only as far as `prepare` goes, which is soon done).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from strategies import strict_json
from strategies.ledger.hardware import GIB

CONFIGS = Path(__file__).parents[1] / "accelerate_configs/cpu"
STRATEGIES = ("fsdp", "zero3")
SPARE = GIB // 2
SMALL = 10_000_000
"""Elements of DeepSpeed's buckets, and of what ZeRO-3 updates at once."""

RETURNED = 2**20
"""Bytes of a tensor from which on glibc's allocator gives memory back to the system as soon as it is let go."""

Figures = dict[str, dict[str, int]]
"""Strategy and way of starting → of the rank with the highest peak: before, prepared, step, shards, block (bytes)."""


def config_of(strategy: str, ranks: int, folder: Path) -> Path:
    """An accelerate config file for it."""
    if strategy != "zero3":
        return CONFIGS / f"{strategy}.yaml"
    zero = {
        **{"stage": 3, "reduce_bucket_size": SMALL, "sub_group_size": SMALL, "stage3_prefetch_bucket_size": SMALL},
        **{"stage3_max_live_parameters": SMALL, "stage3_max_reuse_distance": SMALL},
    }
    (folder / "zero3.json").write_text(strict_json.dumps({"zero_optimization": zero}))
    content = {
        **{"distributed_type": "DEEPSPEED", "use_cpu": True, "num_processes": ranks, "main_process_port": 0},
        **{"deepspeed_config": {"deepspeed_config_file": str(folder / "zero3.json")}},
    }
    path = folder / "zero3_config.json"
    path.write_text(strict_json.dumps(content))
    return path


def launch(strategy: str, ranks: int, run: list[str], folder: Path, until: str = "step") -> dict[str, int]:
    """Train; returns the figures of the rank with the highest peak. Raises RuntimeError where the launch fails."""
    report = folder / "report"
    for old in folder.glob("report.*.json"):
        old.unlink()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(config_of(strategy, ranks, folder)), "--num_processes", str(ranks)]
    command += ["-m", "benchmarks.start_memory_rank", str(report), *run]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(RETURNED)}
    environment["START_MEMORY_UNTIL"] = until
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{strategy} failed: {done.stdout[-3000:]}")
    found: list[dict[str, int]] = [json.loads(path.read_text()) for path in folder.glob("report.*.json")]
    assert len(found) == ranks
    return max(found, key=lambda figures: figures.get("step", figures["prepared"]) - figures["before"])


def measure(layers: int, width: int, ranks: int, strategies: list[str], folder: Path, until: str) -> Figures:
    model = ["--model.layers", str(layers), "--model.width", str(width), "--model.heads", str(width // 64)]
    model += ["--model.vocab-size", "16384", "--model.max-sequence-length", "64"]
    data = ["--data.source", "pydocs", "--data.sequence-length", "16", "--data.global-batch", str(ranks)]
    data += ["--data.micro-batch", "1", "--data.eval-tokens", str(16 * ranks), "--eval-every", "0"]
    common = ["gpt2", *model, *data, "--schedule.warmup", "1", "--out", str(folder), "--progress", "none"]
    starts = {
        "fresh": ["--steps", "1", "--checkpoint.every", "1", "--name", "{}"],
        "resumed": ["--steps", "2", "--resume", f"{folder}/{{}}", "--name", "{}_resumed"],
    }
    figures: Figures = {}
    for strategy in strategies:
        for start, options in starts.items():
            name = f"{strategy}, {start}"
            run = [*common, *(option.format(strategy) for option in options)]
            if until == "step" or start == "fresh":
                figures[name] = launch(strategy, ranks, run, folder, until)
                print(line(name, figures[name]), flush=True)
        shutil.rmtree(folder / strategy)  # its checkpoint: 6 GB
    return figures


def line(name: str, found: dict[str, int], version: str = "now") -> str:
    limit = found["shards"] + found["block"] + SPARE
    shown: list[int | None] = [found["shards"], found["block"], limit, found["prepared"] - found["before"], None, None]
    peak = found.get("step", found["prepared"]) - found["before"]
    if "step" in found:
        shown[4:] = [peak, peak - found["shards"] - found["block"]]
    kept = "no" if peak > limit else "yes" if "step" in found else "not seen"
    cells = ("–" if bytes is None else f"{bytes / GIB:.2f}" for bytes in shown)
    return f"| {name} | {version} | {' | '.join(cells)} | {kept} |"


def table(figures: Figures, before: Figures) -> str:
    rows = [
        "| start | version | shards by the books | largest block | limit | peak in `prepare` | peak, first step done "
        "| beyond shards and block | within |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in figures.items():
        rows += [line(name, before[name], "before")] if name in before else []
        rows.append(line(name, found))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--until", choices=("step", "prepare"), default="step", help="how far runs go")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    parser.add_argument("--before", type=Path, help="the figures of another version")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    asked: Any = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        about = (asked.layers, asked.width, asked.ranks, asked.strategies.split(","))
        figures = measure(*about, Path(folder), asked.until)
    if asked.json:
        asked.json.write_text(strict_json.dumps(figures, indent=1) + "\n")
    parameters = 12 * asked.layers * asked.width**2 + 16384 * asked.width
    before = json.loads(asked.before.read_text()) if asked.before else {}
    text = (
        f"GPT-2's form, {asked.layers} layers of width {asked.width}, vocabulary 16,384, tied: {parameters / 1e9:.2f}B "
        f"parameters in float32, AdamW, {asked.ranks} ranks on a CPU, rows of 16 tokens. GiB; of each start the rank "
        f"with the highest peak.\n\n{table(figures, before)}\n"
    )
    print(text)
    if asked.out:
        asked.out.write_text(f"# Host memory of a rank, up to its first step\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
