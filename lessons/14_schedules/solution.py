"""Lesson 14, Schedules and stability: one way to solve the exercises."""

import math
from statistics import mean, median, stdev


def trapezoid(step: int, steps: int, warmup: int, decay: float) -> float:
    """Up, along, down."""
    down = round(decay * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return min(1.0, (steps - step) / down) if down else 1.0


def cosine(step: int, steps: int, warmup: int, final: float) -> float:
    """Up, and half a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def mean_multiplier(warmup: float, decay: float) -> dict[str, float]:
    """Areas."""
    return {
        "constant": 1 - warmup / 2,
        "trapezoid": 1 - warmup / 2 - decay / 2,
        "cosine": warmup / 2 + (1 - warmup) / 2,
    }


def branch_steps(budgets: list[int], decay: float) -> dict[str, float]:
    """One trunk, and a branch for each budget."""
    return {
        "cosine": sum(budgets),
        "trapezoid": (1 - decay) * max(budgets) + sum(decay * budget for budget in budgets),
    }


def compare_runs(baseline: dict[int, float], other: dict[int, float]) -> tuple[float, float]:
    """Paired by seed, so that what a seed does to both drops out."""
    differences = [other[seed] - loss for seed, loss in baseline.items()]
    return mean(differences), stdev(differences) / math.sqrt(len(differences))


def spikes(losses: list[float], window: int, factor: float) -> list[int]:
    """Medians, which a spike does not move."""
    found = []
    for step in range(window, len(losses)):
        before = [loss for loss in losses[step - window : step] if not math.isnan(loss)]
        middle = median(before)
        spread = median(abs(loss - middle) for loss in before)
        if math.isnan(losses[step]) or losses[step] > middle + factor * spread:
            found.append(step)
    return found
