"""What a training step takes: tokens per second, MFU, peak memory, and where the time goes.

    python -m benchmarks.train_step                       # speedrun on one GPU; tiny where there is none
    python -m benchmarks.train_step --config ddp --processes 8 --share 1     # a whole step, on eight

Eager, compiled, and on a GPU compiled with FP8, each in processes of its own under accelerate launch, in turn, three
times over; of its three medians a variant's lowest counts, because other programs can only slow it down. On a GPU a
step is what one of eight GPUs does in the last, largest stage of speedrun (an eighth of its rows, accumulated as the
preset says), on tokens drawn at random: time does not depend on what they say. On a CPU it is a whole step of tiny.

A step is timed as it runs, then again taken apart: with the device waited for after data, forward pass, backward pass
and optimizer, so that the parts may add up to more than the step. Exchange is what collectives took under several
ranks, beside or inside the other parts; one rank has none. MFU: the arithmetic that `shardrun plan` counts, over the
bf16 peak of the GPU's data sheet, for FP8 too; on a CPU over what torch's matrix product reaches there.

Results are kept by device in train_step.json; train_step.md has all of them. **On a GPU: not yet measured.**
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardrun.launch import find_config, launch, what_went_wrong
from speedrun.data.shards import write_tokens
from strategies import strict_json

VARIANTS = {
    "eager": [],
    "compiled": ["--compile"],
    "compiled + FP8": ["--compile", "--model.fp8"],
}
"""Name → the trainer's options."""

ROW = "| {} | {:,.0f} | {:.1f} | {} | {:,.0f} | {} |"
PARTS = ("data", "forward", "backward", "optimizer", "exchange")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="accelerate config (default: single, or cpu/single without a GPU)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--preset", help="default: speedrun, or tiny without a GPU")
    parser.add_argument("--share", type=int, help="the batch divided by so many (default: 8, or 1 without a GPU)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant is run (default: 3)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="results file (.json)")
    parser.add_argument("trainer", nargs="*", help="further arguments of the trainer, after --")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    config = arguments.config or ("single" if gpu else "cpu/single")
    preset = arguments.preset or ("speedrun" if gpu else "tiny")
    share = arguments.share or (8 if gpu else 1)

    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = random_tokens(Path(folder) / "data") if preset != "tiny" else []
        for name, options in list(VARIANTS.items()) * arguments.rounds:
            if not gpu and "--model.fp8" in options:
                continue  # emulated there
            if not gpu and "--compile" in options and not (shutil.which("g++") or shutil.which("clang++")):
                print(f"{name}: left out, there is no C++ compiler")
                continue
            file, log = Path(folder) / "result.json", Path(folder) / "log.txt"
            loop = [str(file), str(share), str(arguments.steps), preset, *data, *arguments.trainer, *options]
            ranks = ["--num_processes", str(arguments.processes)]
            if launch(find_config(config), "benchmarks.train_step_loop", loop, ranks, log):
                sys.exit(f"{name}: {what_went_wrong(log)}")
            result = json.loads(file.read_text())
            result |= {"preset": preset, "steps": arguments.steps, "rounds": arguments.rounds}
            print(row(name, result), flush=True)
            if name not in measured or result["step_s"] < measured[name]["step_s"]:
                measured[name] = result
    one_peak(measured)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results["gpu" if gpu else "cpu"] = measured
    arguments.out.write_text(strict_json.dumps(results, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(report(results), encoding="utf-8")
    print(report(results))


def one_peak(measured: dict[str, Any]) -> None:
    """Every variant measured a CPU's peak for itself: the highest one counts for all."""
    if any(result["peak_rate"] is None for result in measured.values()):
        return
    best = max(result["peak_rate"] for result in measured.values())
    for result in measured.values():
        result["mfu"] *= result["peak_rate"] / best
        result["peak_rate"] = best


def random_tokens(folder: Path) -> list[str]:
    """Shards of GPT-2 tokens drawn at random, a document start every 500 on average; the option that names them."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    for split, count in (("train", 20_000_000), ("val", 200_000)):
        tokens = generator.integers(0, 50256, count, dtype=np.uint16)
        tokens[generator.random(count) < 1 / 500] = 50256
        tokens[0] = 50256
        write_tokens(folder / f"fineweb_{split}_000000.bin", tokens)
    return ["--data.source", str(folder), "--data.eval-tokens", "100000"]


def report(results: dict[str, Any]) -> str:
    """Markdown: a table per device, or that it is not yet measured."""
    lines = [
        "# A training step",
        "",
        "Written by `python -m benchmarks.train_step`, whose docstring says what is what.",
    ]
    for device, title in (("gpu", "speedrun on one GPU"), ("cpu", "tiny on a CPU")):
        measured = results.get(device)
        lines += ["", f"## {title}", ""]
        if not measured:
            lines += ["Not yet measured.", ""]
            lines += heading() + [f"| {name} | not yet measured |" + " |" * 8 for name in VARIANTS]
            continue
        any_one = next(iter(measured.values()))
        where = f"{any_one['device']}, {any_one['threads']} thread(s)" if device == "cpu" else any_one["device"]
        peak = f", peak {any_one['peak_rate'] / 1e9:,.0f} GFLOP/s" if any_one["peak_rate"] else ""
        lines += [
            f"{where}{peak}, {any_one['ranks']} rank(s) under {any_one['strategy']}, {any_one['precision']}, "
            f"torch {any_one['torch']}, {any_one['tokens_per_step']:,} tokens a step in {any_one['accumulation']} "
            f"micro-batch(es), {any_one['preset']}, median of {any_one['steps']} steps, best of "
            f"{any_one['rounds']} rounds.",
            "",
            *heading(),
            *(row(name, result) for name, result in measured.items()),
        ]
    return "\n".join(lines) + "\n"


def heading() -> list[str]:
    columns = ["", "tokens/s", "ms/step", "MFU", "peak memory (MiB)", *(f"{part} (ms)" for part in PARTS)]
    return [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]


def row(name: str, result: dict[str, Any]) -> str:
    mfu = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
    parts = [f"{1e3 * result['phases_s'][part]:.1f}" for part in PARTS]
    if result["ranks"] == 1:
        parts[-1] = "none"
    return ROW.format(
        name, result["tokens_per_second"], 1e3 * result["step_s"], mfu, result["peak_bytes"] / 2**20, " | ".join(parts)
    )


if __name__ == "__main__":
    main()
