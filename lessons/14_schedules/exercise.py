"""Lesson 14, Schedules and stability. Write the six functions; `shardrun lesson check 14` says what is right."""


def trapezoid(step: int, steps: int, warmup: int, decay: float) -> float:
    """The factor on the peak learning rate at `step` (0 … steps − 1) of a run of `steps`.

    Three parts. The first `warmup` steps lie on a line: it is zero at step −1 and one at step `warmup`. Then the factor
    is one. The last round(decay · steps) steps lie on a line down: one at the first of them, zero at step `steps`,
    which is no longer made. So no step has a rate of zero. Warm-up and warm-down do not overlap.
    """
    raise NotImplementedError


def cosine(step: int, steps: int, warmup: int, final: float) -> float:
    """The same with half a cosine: one at step `warmup`, `final` at step `steps` (no longer made). Warm-up as above."""
    raise NotImplementedError


def mean_multiplier(warmup: float, decay: float) -> dict[str, float]:
    """The mean of the factor over a long run: "constant", "trapezoid" and "cosine" (down to zero).

    warmup, decay: shares of the run. All three have the warm-up, only the trapezoid has the warm-down.
    """
    raise NotImplementedError


def branch_steps(budgets: list[int], decay: float) -> dict[str, float]:
    """Steps to train in all in order to know the final loss at each of several budgets: "cosine" and "trapezoid".

    budgets: different numbers of steps; decay: the share of each budget that its warm-down takes. A run can be saved at
    any step and continued several times. Warm-up is the same for all.
    """
    raise NotImplementedError


def compare_runs(baseline: dict[int, float], other: dict[int, float]) -> tuple[float, float]:
    """(mean, standard error) of the difference other − baseline; both: seed → final loss, for the same seeds.

    The standard error is that of the mean of paired differences. At least two seeds.
    """
    raise NotImplementedError


def spikes(losses: list[float], window: int, factor: float) -> list[int]:
    """The steps (from 0) whose loss is out of line, of those that have `window` losses before them.

    Out of line: nan; or above the median of the `window` losses before by more than `factor` times their median
    absolute deviation from that median. Losses that are nan are left out of medians; some loss of a window is none.
    """
    raise NotImplementedError
