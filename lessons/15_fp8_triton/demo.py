"""Lesson 15: eight bits and a scale, a product by tiles in a Triton kernel, and training with both.

python demo.py                                                  one process, on this machine
accelerate launch --config_file …/cpu/ddp_bf16.yaml demo.py     the training on two ranks
"""

import os
import time
from dataclasses import replace

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be there before Triton is imported

from lessons.kit import (
    CONFIG,
    doing,
    headline,
    launched,
    open_text,
    prepare,
    run_steps,
    save_figure,
    steps,
    table,
    with_model,
)
from shardrun.lesson.guess import guess_first
from speedrun.kernels import INSTALLED, INTERPRETED
from speedrun.kernels.fp8 import product, product_reference, quantize, quantize_reference, scale_reference
from speedrun.kernels.fp8_formats import E4M3, E5M2
from speedrun.run.ending import guarded
from strategies import catalogue

STEPS, LAST = steps(40), 10
RUNS = {"float32": ("fp32", False), "bfloat16": ("bf16", False), "bfloat16 and FP8": ("bf16", True)}
HEAD = (49_152, 50_304, 768)
"""Rows, columns and depth of the record's head: tokens of one of eight GPUs, words, width."""
BANDWIDTH, PEAK = 3.35e12, 1979e12
"""An H100's bytes and dense FP8 operations a second, from its data sheet."""


def main() -> None:
    guess = guess_first(15)
    launch, first = launched()
    data, runs = open_text(), {}
    for name, (precision, fp8) in RUNS.items():
        strategy = catalogue.engine(launch.strategy, replace(first.settings, precision=precision))
        doing(f"{STEPS} steps in {name}")
        prepare(strategy, with_model(CONFIG, fp8=fp8))
        runs[name] = run_steps(strategy, launch, data, STEPS)
    if launch.rank:
        return
    print(headline(replace(launch, precision="three precisions"), "FP8 and Triton"))
    formats()
    guess.tell(count(E4M3))
    curves = scales()
    tiles()
    kernels("cuda" if torch.cuda.is_available() else "cpu")
    training(runs, launch.cpu)
    print(save_figure("lesson_15_fp8", lambda figure: draw(figure, curves, runs)))


def formats() -> None:
    print("\nThe formats:")
    lines = []
    for dtype in (E4M3, E5M2, torch.bfloat16, torch.float32):
        info = torch.finfo(dtype)
        every = f"{count(dtype)}" if info.bits == 8 else f"2^{info.bits}, nearly"
        row = [every, f"{info.max:.4g}", f"{info.smallest_normal:.2g}", f"{info.eps:.2g}"]
        lines.append([str(dtype).removeprefix("torch."), *row])
    print(table(["", "numbers", "largest", "smallest normal", "from 1 to the next"], lines))


def count(dtype: torch.dtype) -> int:
    """Different finite numbers of an 8-bit format."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return len(numbers[numbers.isfinite()].unique())


def rounded(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return quantize_reference(x, scale, dtype).float() * scale


def error(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = E4M3) -> float:
    """‖rounded − x‖ / ‖x‖."""
    return ((rounded(x, scale, dtype) - x).norm() / x.norm()).item()


def scales() -> dict[str, tuple[list[float], list[float]]]:
    """Print what scales do to a weight matrix; returns error curves over the scale, for the picture."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(512, 512, generator=generator)
    weight[:, :8] *= 0.001  # a few columns are small, as they are when their inputs are large
    outlier = weight.clone()
    outlier[0, 0] = 1000.0
    one = torch.ones(())
    lines = []
    for name, x, scale in (
        ("scale 1: none at all", weight, one),
        ("current: 448 for the largest", weight, scale_reference(weight.abs().max(), E4M3)),
        ("the head's, 1.6 / 448", weight, one * 1.6 / 448),
        ("delayed, weights 4 times as large by now", weight, scale_reference(weight.abs().max() / 4, E4M3)),
        ("current, with one outlier of 1000", outlier, scale_reference(outlier.abs().max(), E4M3)),
    ):
        inside = x[1:, 8:]  # what is neither small nor the outlier
        again = rounded(x, scale, E4M3)
        shown = ((again[1:, 8:] - inside).norm() / inside.norm()).item()
        lost = (again[:, :8] == 0).float().mean().item()
        largest = (again.abs() == 448 * scale).float().mean().item()
        lines.append([name, f"{scale.item():.2g}", f"{shown:.1%}", f"{lost:.0%}", f"{largest:.2%}"])
    print("\nA weight matrix of deviation 0.02, eight of its columns a thousand times smaller, in e4m3:")
    print(table(["", "scale", "error", "of the small, 0", "at the limit"], lines))
    xs = [2.0**e for e in range(-22, 3)]
    return {name: (xs, [error(weight, one * s, dtype) for s in xs]) for name, dtype in (("e4m3", E4M3), ("e5m2", E5M2))}


def tiles() -> None:
    """What a product has to read: from the formula, for an H100."""
    rows, columns, depth = HEAD
    print(f"\nThe record's head, {rows:,} × {columns:,} × {depth}, in FP8 by tiles (formula; caches not counted):")
    lines = []
    for high, wide in ((1, 1), (16, 16), (64, 64), (128, 128), (128, 256)):
        read = (rows / high) * (columns / wide) * (high + wide) * depth
        written = 2 * rows * columns
        moved = (read + written) / BANDWIDTH * 1e3
        lines.append([f"{high} × {wide}", f"{read / 1e9:,.0f}", f"{written / 1e9:,.0f}", f"{moved:,.1f}"])
    print(table(["tile", "GB read", "GB written", "ms to move them"], lines))
    print(
        f"Its {2 * rows * columns * depth / 1e12:.1f}e12 operations take {2e3 * rows * columns * depth / PEAK:.1f} ms."
    )


def kernels(device: str) -> None:
    """The trainer's own kernels, beside plain torch."""
    if not INSTALLED:
        print("\nTriton is not installed here (Linux: pip install 'shardrun[kernels]'): no kernels to run.")
        return
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 320, generator=generator), 0.02 * torch.randn(260, 320, generator=generator)
    x, weight = x.to(device), weight.to(device)
    started = time.perf_counter()
    x8, _, x_scale = quantize(x, 0.0, E4M3, False, "triton")
    w8, _, w_scale = quantize(weight, 0.0, E4M3, False, "triton")
    y = product(x8, w8, x_scale, w_scale, torch.float32, True, "triton")
    seconds = time.perf_counter() - started
    torchs = product_reference(x8, w8, x_scale, w_scale, torch.float32)
    other = (x8.float() != quantize_reference(x, x_scale, E4M3).float()).float().mean().item()
    where = "in Triton's interpreter, on the CPU" if INTERPRETED else "on the GPU (the first call compiles)"
    print(f"\nThe trainer's kernels, {where}:")
    print("  x [200, 320] · weightᵀ [320, 260], 2 × 3 tiles of 128 × 128")
    apart = ((y - torchs).norm() / torchs.norm()).item()
    print(f"  the product: {apart:.0e} from torch's, of the same 8-bit numbers; {seconds * 1e3:,.0f} ms with the rest")
    print(f"  quantising: {other:.0%} of the numbers differ from torch's rounding")
    if INTERPRETED:
        print("  (The interpreter does not round to the nearest. It shows what a kernel does, not how fast.)")
    exact = x @ weight.T
    q, r = quantize_reference(x, x_scale, E4M3), quantize_reference(weight, w_scale, E4M3)
    away = ((product_reference(q, r, x_scale, w_scale, torch.float32) - exact).norm() / exact.norm()).item()
    print(f"  FP8, rounded to the nearest: the product is {away:.1%} from that in float32")


def training(runs: dict[str, list[float]], cpu: bool) -> None:
    print(f"\n{STEPS} steps, the same weights and batches; training loss, and its mean over the last {LAST}:")
    lines = [
        [name, *(f"{losses[i]:.4f}" for i in (0, STEPS // 2)), f"{sum(losses[-LAST:]) / LAST:.4f}"]
        for name, losses in runs.items()
    ]
    print(table(["", "first", "half way", "end"], lines))
    if cpu:
        print("On a CPU FP8 is imitated, with products in float32: its errors can be seen, not its speed.")


def draw(figure, curves, runs) -> None:
    left, right = figure.subplots(1, 2)
    for name, (xs, errors) in curves.items():
        left.loglog(xs, errors, label=name)
    left.set_title("Error of a weight matrix over the scale", loc="left")
    left.set_xlabel("scale")
    left.legend(frameon=False)
    for name, losses in runs.items():
        right.plot(range(1, STEPS + 1), losses, label=name)
    right.set_title("Training loss", loc="left")
    right.legend(frameon=False)


if __name__ == "__main__":
    guarded(main)
