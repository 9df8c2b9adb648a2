"""What the framework costs: a step of the trainer under ddp against a hand-written torch DDP loop, paired.

    python -m benchmarks.overhead                  # both optimizers, 5 pairs of runs, a few minutes on two cores
    python -m benchmarks.overhead --out FILE.md    # also write the table

Each pair launches the real trainer (accelerate launch … -m speedrun.train, with everything that it does in a step:
data, schedules, the exchange of matrices, the global norm, logging) and then the loop below, which is what one would
write by hand: the same model, data and clipping, torch's DistributedDataParallel over everything, torch's fused
AdamW, and for Muon a plain loop in which every rank orthogonalises every matrix. Two ranks each, one thread per rank.
The figure is the ratio of the median step times of a pair; runs alternate, so that whatever else the machine does
falls on both.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from shardrun.launch import launch, shipped_config, what_went_wrong
from speedrun.run.record import step_times

ROWS, TOKENS = 16, 128
TRAINER = ["--data.global-batch", str(ROWS), "--data.sequence-length", str(TOKENS), "--data.eval-tokens", "1024"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    arguments = parser.parse_args()
    lines = [
        f"{arguments.pairs} pairs of {arguments.steps} steps of tiny, {ROWS}×{TOKENS} tokens over two ranks, fp32, "
        f"{os.cpu_count()} cores.",
        "",
        "| optimizer | trainer, ms/step | hand-written, ms/step | ratio, median of pairs | lowest | highest |",
        "|---|---|---|---|---|---|",
    ]
    for optimizer in ("adamw", "muon"):
        pairs = [_pair(optimizer, arguments.steps) for _ in range(arguments.pairs)]
        ratios = [ours / theirs for ours, theirs in pairs]
        lines.append(
            f"| {optimizer} | {statistics.median(ours for ours, _ in pairs):.1f} "
            f"| {statistics.median(theirs for _, theirs in pairs):.1f} | {statistics.median(ratios):.3f} "
            f"| {min(ratios):.3f} | {max(ratios):.3f} |"
        )
        print(lines[-1], flush=True)
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text(f"# Overhead over a hand-written DDP loop\n\n{(chr(10)).join(lines)}\n")


def _pair(optimizer: str, steps: int) -> tuple[float, float]:
    """Median step times in ms of the trainer and of the hand-written loop, the first fifth of the steps left out."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--steps", str(steps), "--optimizer.name", optimizer, *TRAINER, "--eval-every", "0"]
        options += ["--out", folder, "--name", "run", "--optimizer.orthogonalization-dtype", "float32"]
        _run("speedrun.train", ["tiny", *options], Path(folder))
        metrics = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()][1:]
        ours = step_times(metrics)
        _run("benchmarks.overhead_loop", [optimizer, str(steps), folder], Path(folder))
        theirs = json.loads((Path(folder) / "loop.json").read_text())
    return statistics.median(ours[len(ours) // 5 :]), statistics.median(theirs[steps // 5 :])


def _run(module: str, arguments: list[str], folder: Path) -> None:
    log = folder / "log.txt"
    if launch(shipped_config("cpu/ddp"), module, arguments, ["--num_processes", "2"], log):
        raise SystemExit(what_went_wrong(log))
    time.sleep(0.5)


if __name__ == "__main__":
    main()
