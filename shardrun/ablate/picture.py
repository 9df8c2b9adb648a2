"""The picture of a comparison. Imported only where it is drawn: matplotlib is an extra."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from shardrun.ablate.comparison import Comparison
from shardrun.colours import ACCENT, REFERENCE, SENT
from shardrun.output import save_picture

LOOKS = {-1: (ACCENT, "v", "lower loss than the baseline"), 0: (REFERENCE, "o", "no difference seen")}
LOOKS[1] = (SENT, "^", "higher loss than the baseline")
"""Sign of an effect → colour (Okabe and Ito's palette), marker (for who cannot tell colours apart), and words."""


def draw_effects(comparison: Comparison, path: Path) -> None:
    """Per arm: the difference of every seed, their mean and its 95 % interval; beside it, what a step takes longer."""
    baseline, *arms = comparison.rows
    rows = sorted((row for row in arms if row.loss), key=lambda row: row.loss.mean if row.loss else 0.0)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 1.8 + 0.3 * len(rows)), width_ratios=(3, 1), sharey=True, layout="constrained"
    )
    for y, row in enumerate(rows):
        assert row.loss is not None
        colour, marker, words = LOOKS[row.loss.sign]
        differences = [ours - theirs for ours, theirs in zip(row.losses, baseline.losses, strict=True)]
        left.plot(differences, [y] * len(differences), "|", color=colour, markersize=9, alpha=0.7)
        if row.loss.low is not None and row.loss.high is not None:
            left.plot([row.loss.low, row.loss.high], [y, y], color=colour, linewidth=2, alpha=0.5)
        left.plot([row.loss.mean], [y], marker, color=colour, label=words)
        if row.step_time:
            right.barh(y, 100 * row.step_time.mean, 0.6, color=REFERENCE)
    left.set_yticks(range(len(rows)), [row.arm.name for row in rows])
    means = [0.0, *(row.loss.mean for row in rows if row.loss)]
    margin = 0.3 * (max(means) - min(means)) or 0.01
    left.set_xlim(min(means) - margin, max(means) + margin)  # an interval of few seeds may run out of the picture
    left.set_title("Δ validation loss at equal tokens (nats per token)", loc="left", fontsize=10)
    right.set_title("Δ step time (%)", loc="left", fontsize=10)
    once = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
    for axes in (left, right):
        axes.axvline(0, color="black", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
    save_picture(figure, path, dpi=150)
    plt.close(figure)
