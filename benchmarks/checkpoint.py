"""How long a save holds up training: asynchronous against synchronous, paired, for the 124M preset.

    python -m benchmarks.checkpoint                  # gpt2: 1.5 GB a checkpoint, 5 pairs, a minute or two
    python -m benchmarks.checkpoint --out FILE.md    # also write the table

One process, the strategy `single`, the preset's model and optimizer with state of the right size (AdamW: weights and
two moments in float32). Each pair saves once and waits until every byte is on the disk (synchronous), then once and
returns as soon as the copy in host memory is made (asynchronous: the stall that training sees); the rest of it is
waited for outside of the clock. Which goes first alternates. The first pair is left out: it allocates the host memory
that later ones use again, as in a run, and is shown on its own.

Then pairs of synchronous saves, one of which does not look whether every value is finite: what that look costs.

The last line is the other side: what a save in the background costs the steps that go on beside it. They are stood for
by a fixed amount of matrix products, timed right after every asynchronous save and again when it is on the disk.
"""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from speedrun.model import GPT
from speedrun.optim.policy import parameter_groups
from speedrun.presets import PRESETS
from strategies import catalogue
from strategies.base import Settings
from strategies.checkpoint import save as saving
from strategies.checkpoint.save import Saver
from strategies.mesh import Place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2", choices=sorted(PRESETS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        text = measure(arguments.preset, arguments.pairs, Path(folder))
    print(text)
    if arguments.out:
        arguments.out.write_text(f"# How long a save holds up training\n\n{text}\n", encoding="utf-8")


def measure(preset: str, pairs: int, folder: Path) -> str:
    """Run it; returns the tables."""
    config = PRESETS[preset][1]
    model = GPT(config.model)
    model.init_weights(config.seed)
    recipe = parameter_groups({name: tuple(p.shape) for name, p in model.named_parameters()}, config.optimizer)
    strategy = catalogue.engine("single", Settings(Place(0, 1, torch.device("cpu")), "fp32", {}))
    strategy.prepare(model, recipe, clip=0.0, accumulation=1)
    strategy.optimizer.initialize()
    saver = Saver(folder, "single", "fp32", strategy.optimizer, keep=1)
    step = 0
    beside: list[float] = []
    alone: list[float] = []

    def save(wait: bool) -> float:
        nonlocal step
        step += 1
        started = time.perf_counter()
        saver.save(step, {})
        if wait:
            saver.wait()
        seconds = time.perf_counter() - started
        if not wait:
            beside.append(_work())
            saver.wait()
            alone.append(_work())
        if saver.failure:
            raise SystemExit(saver.failure)
        return seconds

    lines = []
    shares = []
    for pair in range(pairs + 1):
        order = (True, False) if pair % 2 else (False, True)
        times = {wait: save(wait) for wait in order}
        share = times[False] / times[True]
        lines.append(f"| {pair or 'first'} | {times[True]:.2f} | {times[False]:.2f} | {100 * share:.1f} % |")
        print(lines[-1], flush=True)
        if pair:
            shares.append(share)
    looks = []
    for pair in range(pairs):
        seconds = {}
        for looking in (True, False) if pair % 2 else (False, True):
            with nullcontext() if looking else mock.patch.object(saving, "first_not_finite", lambda _: None):
                seconds[looking] = save(True)
        looks.append((seconds[True], seconds[False], seconds[True] / seconds[False]))
    size = sum(path.stat().st_size for path in next(folder.glob("step_*")).iterdir())
    return "\n".join(
        [
            f"{preset}, {sum(p.numel() for p in model.parameters()):,} parameters, {size / 1e9:.2f} GB a checkpoint, "
            f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end.",
            "",
            "| pair | synchronous, s | asynchronous, s | share |",
            "|---|---|---|---|",
            *lines,
            "",
            f"The stall is {100 * statistics.median(shares):.1f} % of the synchronous time (median of {pairs} pairs; "
            f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %). Aim: at most 10 %.",
            "",
            "| pair, synchronous | looking for values that are not finite, s | not looking, s | ratio |",
            "|---|---|---|---|",
            *(f"| {i} | {a:.2f} | {b:.2f} | {ratio:.2f} |" for i, (a, b, ratio) in enumerate(looks, 1)),
            "",
            f"Looking takes {statistics.median(ratio for *_, ratio in looks):.2f} times as long (median; "
            f"{min(ratio for *_, ratio in looks):.2f} to {max(ratio for *_, ratio in looks):.2f}).",
            "",
            f"Matrix products that take {statistics.median(alone):.2f} s alone took {statistics.median(beside):.2f} s "
            "beside a save in the background (medians).",
        ]
    )


def _work() -> float:
    """Seconds that a fixed amount of arithmetic takes."""
    a = torch.ones(512, 512)
    started = time.perf_counter()
    for _ in range(300):
        a = (a @ a) / 512
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
