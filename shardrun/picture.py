"""Pictures of the books. Imported only where one is drawn: matplotlib is an extra."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#999999")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
HATCHES = ("", "//", "", "\\\\", "..")


def draw_comparison(memory: dict[str, dict[str, int]], sent: dict[str, float], ranks: int, path: Path) -> None:
    """Stacked bars of what the fullest rank holds, and bars of what it sends, per strategy. Bytes in, MiB shown."""
    mib = 2**20
    names = list(memory)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(3, 2), layout="constrained")
    bottom = [0.0] * len(names)
    kinds = list(next(iter(memory.values())))
    for kind, colour, hatch in zip(kinds, COLOURS, HATCHES, strict=True):
        values = [memory[name][kind] / mib for name in names]
        if any(values):
            left.bar(names, values, 0.62, bottom=bottom, label=kind, color=colour, hatch=hatch, edgecolor="white")
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    for i, total in enumerate(bottom):
        left.text(i, total, f"{total:.1f}", ha="center", va="bottom", fontweight="bold")
    left.set_title(f"What one of {ranks} ranks holds before a step (MiB)", loc="left")
    left.set_ylim(0, max(bottom) * 1.25)
    left.legend(ncols=5, loc="upper left", frameon=False, fontsize=8.5, columnspacing=1.0, handlelength=1.4)
    values = [sent[name] / mib for name in names]
    bars = right.bar(names, values, 0.62, color="#D55E00", edgecolor="white")
    right.bar_label(bars, [f"{value:.1f}" for value in values], fontweight="bold")
    right.set_title("What it puts on the wire per step (MiB)", loc="left")
    right.set_ylim(0, max(values) * 1.15)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)
