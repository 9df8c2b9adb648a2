"""Lesson 17, The speedrun: one way to solve the exercises."""

import re
import statistics

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def read_record(text: str) -> list[tuple[int, float, float]]:
    """Only lines that begin with step: and have a val_loss."""
    lines = re.findall(r"^step:(\d+)/.* val_loss:(\S+) .*train_time:(\d+)ms", text, re.M)
    return [(int(step), float(loss), int(ms) / 1000) for step, loss, ms in lines]


def tokens_to_target(curve: list[tuple[int, float]], target: float) -> float | None:
    """The first pair of validations that the target lies between."""
    for (before, above), (after, below) in zip(curve, curve[1:], strict=False):
        if below <= target:
            return before + (above - target) / (above - below) * (after - before)
    return None


def step_ms(train_time_ms: list[float]) -> dict[str, float]:
    """The average has everything in it, the median what is usual."""
    steps = [after - before for before, after in zip([0.0, *train_time_ms], train_time_ms, strict=False)]
    return {"average": train_time_ms[-1] / len(train_time_ms), "median": statistics.median(steps)}


def mfu(matrices: int, layers: int, width: int, length: int, tokens_per_second: float, gpus: int, peak: float) -> float:
    """2 forward and 4 backward per element."""
    per_token = 6 * matrices + 6 * layers * width * length
    return per_token * tokens_per_second / (gpus * peak)


def paired(changed: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """Differences first, then their mean and spread."""
    differences = [c - b for c, b in zip(changed, baseline, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    half = T_975[n - 2] * statistics.stdev(differences) / n**0.5
    return mean, mean - half, mean + half
