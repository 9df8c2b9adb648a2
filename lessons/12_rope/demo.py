"""Lesson 12: what a rotation does to attention scores, and what a second one does to training.

python demo.py                                                  one process, on this machine
accelerate launch --config_file …/cpu/ddp.yaml demo.py          the same on two ranks
"""

import math
from contextlib import contextmanager
from dataclasses import replace

import torch

import speedrun.model.attention as attention
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
from speedrun.model.rope import rope_tables, rotate
from speedrun.run.ending import guarded
from strategies import catalogue

STEPS = steps(30)
CHANNELS, BASE = 64, 1024.0


def main() -> None:
    guess = guess_first(12)
    launch, first = launched()
    settings = replace(first.settings, precision="fp32")
    data = open_text()
    losses = {
        "rotated once": train(launch, settings, data),
        "rotated twice": train(launch, settings, data, twice=True),
        "learned positions": train(launch, settings, data, with_model(CONFIG, positions="learned")),
    }
    if launch.rank == 0:
        report(replace(launch, precision="fp32"), losses, guess)


@contextmanager
def rotated_twice(on: bool):
    """The bug: everything that attention rotates, it rotates once more."""
    attention.rotate = (lambda x, cos, sin: rotate(rotate(x, cos, sin), cos, sin)) if on else rotate
    try:
        yield
    finally:
        attention.rotate = rotate


def train(launch, settings, data, config=CONFIG, twice: bool = False) -> list[float]:
    doing(f"{STEPS} steps, {config.model.positions} positions" + ", rotated twice" * twice)
    strategy = catalogue.engine(launch.strategy, settings)
    prepare(strategy, config)
    with rotated_twice(twice):
        return run_steps(strategy, launch, data, STEPS)


def score(i: int, j: int, times: int = 1, rotate_k: bool = True) -> float:
    """q·k of one fixed q at position i and one fixed k at position j, each turned `times` times."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, CHANNELS, generator=generator, dtype=torch.float64)
    cos, sin = rope_tables(max(i, j) + 1, CHANNELS, BASE, torch.device("cpu"), torch.float64)
    for _ in range(times):
        q = rotate(q.view(1, 1, 1, -1), cos[i : i + 1], sin[i : i + 1]).flatten()
        if rotate_k:
            k = rotate(k.view(1, 1, 1, -1), cos[j : j + 1], sin[j : j + 1]).flatten()
    return (q @ k).item() / math.sqrt(CHANNELS)


def report(launch, losses, guess) -> None:
    print(headline(launch, "RoPE"))
    print("\nThe score of the same q and k, 3 tokens apart, wherever they stand:")
    places = ((3, 0), (10, 7), (500, 497))
    kinds = {
        "both rotated": lambda i, j: score(i, j),
        "only q rotated: a mistake": lambda i, j: score(i, j, rotate_k=False),
        "both rotated twice: a bug": lambda i, j: score(i, j, times=2),
        "6 apart, rotated once": lambda i, j: score(i + 3, j),
    }
    lines = [[name, *(f"{kind(i, j):.4f}" for i, j in places)] for name, kind in kinds.items()]
    print(table(["", *(f"q at {i}, k at {j}" for i, j in places)], lines))
    guess.tell(min(range(1, 13), key=lambda distance: abs(score(distance, 0) - score(3, 0, times=2))))
    cos, sin = rope_tables(2048, CHANNELS, BASE, torch.device("cpu"), torch.float32)
    print(f"\nTables of 2048 positions for heads of {CHANNELS}: {cos.nbytes + sin.nbytes:,} bytes, once for all heads.")
    half, _ = rope_tables(2048, CHANNELS, BASE, torch.device("cpu"), torch.bfloat16)
    print(
        f"Made in bfloat16 a cosine is up to {(half.float() - cos).abs().max().item():.2f} off: positions are rounded."
    )
    print(f"\nLoss after {STEPS} steps (mean of the last 5):")
    print(table(["", "loss"], [[name, f"{sum(values[-5:]) / 5:.3f}"] for name, values in losses.items()]))
    print(save_figure("lesson_12_rope", lambda figure: draw(figure, losses)))


def draw(figure, losses) -> None:
    left, right = figure.subplots(1, 2)
    distances = range(64)
    for times, name in ((1, "rotated once"), (2, "rotated twice")):
        left.plot(distances, [score(100 + d, 100, times) for d in distances], label=name)
    left.set_title("Score of one q and k by distance (tokens)", loc="left")
    left.legend(frameon=False)
    for name, values in losses.items():
        right.plot(range(1, STEPS + 1), values, label=name)
    right.set_title("Training loss by step", loc="left")
    right.legend(frameon=False)


if __name__ == "__main__":
    guarded(main)
