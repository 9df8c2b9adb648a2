"""The first steps in bf16: how far is each strategy's loss from FSDP's?

    python -m benchmarks.bf16_start [--out benchmarks/bf16_start.md]

All of them start from the same float32 values, and the matrix products of all are in bf16. What is left apart is where
an engine rounds. The `gpt2` preset, cut to two layers of width 128 and bytes, takes eight steps of its warm-up, so
small that most weights keep their bf16 values: masters that had been rounded before the first step would be seen at
once. The real trainer on the CPU, all strategies one after the other in each set of ranks; some five minutes of CPU
time where bf16 is emulated.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from speedrun.run.command_line import parse
from speedrun.train import train
from strategies import catalogue
from strategies.select import Launch

STEPS = 8
OPTIONS = [
    *("gpt2", "--steps", str(STEPS), "--eval-every", "0", "--progress", "none", "--untimed-steps", "0"),
    *("--model.layers", "2", "--model.width", "128", "--model.heads", "2"),
    *("--model.vocab-size", "257", "--model.pad-vocab-to", "1", "--model.max-sequence-length", "128"),
    *("--data.source", "pydocs", "--data.sequence-length", "128", "--data.global-batch", "4"),
    *("--data.micro-batch", "0", "--data.eval-tokens", "256"),
]
"""Of the trainer, for AdamW. The preset's warm-up is 256 steps."""

OPTIMIZERS = {
    "AdamW": [],
    "Muon, orthogonalised in float32": ["--optimizer.name", "muon", "--optimizer.orthogonalization-dtype", "float32"],
}

WORLDS = (1, 2, 4)

ROWS = {
    "ddp": "autocast: the residual stream and what the norms give stay float32, which are bf16 under FSDP and ZeRO",
    "zero1": "on several ranks gradients are rounded to bf16 before they are added up, which FSDP does in float32",
    "zero2": "as zero1",
    "zero3": "as zero1",
}
"""Strategy → why it is where it is."""

NOTES = (
    "With Muon on one rank what is left is rounding in float32, whose sums run in another order; orthogonalisation "
    "lifts it together with the smallest singular values. That is an explanation and not traced further.",
    "Before ZeRO's masters took the initial float32 values, and linear layers one order of rounding, zero2 was 1.8e-3 "
    "away and zero3 2.1e-3 (AdamW, one rank, 4 × 64 bytes).",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the table (.md)")
    parser.add_argument("--as-a-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_a_rank:
        train_all(arguments.as_a_rank)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for ranks in WORLDS:
            found[ranks] = losses(ranks, Path(folder) / str(ranks))
            print(f"{ranks} of {max(WORLDS)} ranks: done", flush=True)
    arguments.out.write_text(report(found), encoding="utf-8")


def train_all(folder: Path) -> None:
    """On a rank: every strategy with every optimizer. ZeRO-3 comes last: it changes torch's linear layer for good."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for strategy in ("fsdp", *ROWS):
        for number, options in enumerate(OPTIMIZERS.values()):
            name = ["--out", str(folder), "--name", f"{strategy}_{number}"]
            preset, config = parse([*OPTIONS, *options, *name])
            engine = catalogue.books(strategy).default_engine(world_size)
            train(preset, config, Launch(strategy, rank, rank, world_size, world_size, "bf16", True, engine))
    sys.stdout.flush()
    os._exit(0)  # past engines that wait for one another


def losses(ranks: int, folder: Path) -> dict[tuple[str, str], list[float]]:
    """By strategy and optimizer: the training losses of every step."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*torchrun, "-m", "benchmarks.bf16_start", "--as-a-rank", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    result = {}
    for strategy in ("fsdp", *ROWS):
        for number, optimizer in enumerate(OPTIMIZERS):
            text = (folder / f"{strategy}_{number}" / "metrics.jsonl").read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text.splitlines()]
            result[strategy, optimizer] = [line["train_loss"] for line in lines if line["step"]]
    return result


def distance(ours: list[float], theirs: list[float]) -> float:
    """The largest relative one over all steps."""
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def report(found: dict[int, dict[tuple[str, str], list[float]]]) -> str:
    """found: by number of ranks what `losses` gives. Returns Markdown."""
    lines = [
        "# The first steps in bf16",
        "",
        f"The largest distance of a training loss from FSDP's on as many ranks, relative, over the first {STEPS} "
        "steps. `gpt2` cut to 2 layers of width 128, 4 × 128 bytes a step, warm-up 256, bf16, on a CPU, torch "
        f"{torch.__version__}. `python -m benchmarks.bf16_start`",
        "",
    ]
    for optimizer in OPTIMIZERS:
        lines += [f"## {optimizer}", "", f"| ranks | {' | '.join(map(str, found))} | why |"]
        lines.append(f"|---|{'---:|' * len(found)}---|")
        for strategy, why in ROWS.items():
            cells = [distance(of[strategy, optimizer], of["fsdp", optimizer]) for of in found.values()]
            lines.append(f"| {strategy} | {' | '.join(f'{cell:.1e}' for cell in cells)} | {why} |")
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in NOTES), ""])


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
