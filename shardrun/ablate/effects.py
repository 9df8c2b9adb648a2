"""What a change does, and how sure that is: paired differences over seeds. Plain arithmetic."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, 97.5th percentile, for 1 … 10 degrees of freedom. More than that take the last: an interval that is a
little too wide (by 12 % at most)."""


@dataclass(frozen=True)
class Effect:
    """Differences of pairs: their mean, standard deviation (of a sample), and the 95 % interval of the mean if they
    are normally distributed. With one pair nothing is known of the spread: None."""

    mean: float
    spread: float | None
    low: float | None
    high: float | None
    pairs: int

    @property
    def sign(self) -> int:
        """−1 or 1 where the interval leaves out zero, 0 where it does not or there is none."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def effect(differences: Sequence[float]) -> Effect:
    """differences: one per seed, change minus baseline."""
    mean, pairs = statistics.fmean(differences), len(differences)
    if pairs == 1:
        return Effect(mean, None, None, None, 1)
    spread = statistics.stdev(differences)
    half = T_975[min(pairs - 1, len(T_975)) - 1] * spread / pairs**0.5
    return Effect(mean, spread, mean - half, mean + half, pairs)


def reached(curve: Sequence[tuple[int, float, float]], target: float) -> tuple[float, float] | None:
    """Tokens and seconds at which a validation curve first comes down to the target; None where it never does.

    Linear between the two validations around it. A curve that begins below the target has reached it there.
    """
    before = None
    for tokens, loss, seconds in curve:
        if loss <= target:
            if before is None:
                return float(tokens), seconds
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (tokens - before[0]), before[2] + share * (seconds - before[2])
        before = (tokens, loss, seconds)
    return None


def loss_at(curve: Sequence[tuple[int, float, float]], share: float) -> float:
    """The loss of the first validation at or after this share of a curve's tokens."""
    return next(loss for tokens, loss, _ in curve if tokens >= share * curve[-1][0])
