"""Pictures of the books. Imported only where one is drawn: matplotlib is an extra."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from shardrun.colours import COLOURS, SENT
from shardrun.output import save_picture

HATCHES = {"master parameters": "//", "optimizer states": "\\\\", "communication buffers": ".."}
"""So that neighbours differ in print too."""


def draw_comparison(memory: dict[str, dict[str, int]], sent: dict[str, float], ranks: int, path: Path) -> None:
    """Stacked bars of what the fullest rank holds, by category, and bars of what it sends, per strategy.

    Bytes in, MiB shown. Raises KeyError for a category that has no colour.
    """
    mib = 2**20
    names = list(memory)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(3, 2), layout="constrained")
    bottom = [0.0] * len(names)
    for category in next(iter(memory.values())):
        values = [memory[name][category] / mib for name in names]
        if any(values):
            looks = {"color": COLOURS[category], "hatch": HATCHES.get(category, ""), "edgecolor": "white"}
            left.bar(names, values, 0.62, bottom=bottom, label=category, **looks)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    for i, total in enumerate(bottom):
        left.text(i, total, f"{total:.1f}", ha="center", va="bottom", fontweight="bold")
    left.set_title(f"What the fullest of {ranks} ranks holds before a step (MiB)", loc="left")
    left.set_ylim(0, max(bottom) * 1.3)
    left.legend(ncols=3, loc="upper left", frameon=False, fontsize=8.5, columnspacing=1.2, handlelength=1.6)
    values = [sent[name] / mib for name in names]
    bars = right.bar(names, values, 0.62, color=SENT, edgecolor="white")
    right.bar_label(bars, [f"{value:.1f}" for value in values], fontweight="bold")
    right.set_title("What it sends in a step (MiB)", loc="left")
    right.set_ylim(0, max(values) * 1.15)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
    save_picture(figure, path, dpi=150)
    plt.close(figure)
