"""The statistics, against known answers and against the definition of Student's t."""

import math

import pytest

from shardrun.ablate.effects import T_975, effect, loss_at, reached


def test_the_quantiles_leave_a_fortieth_above_them() -> None:
    for freedom, quantile in enumerate(T_975, start=1):

        def density(x: float, n: int = freedom) -> float:
            constant = math.gamma((n + 1) / 2) / (math.sqrt(n * math.pi) * math.gamma(n / 2))
            return constant * (1 + x * x / n) ** (-(n + 1) / 2)

        width = quantile / 20_000
        below = sum(density((i + 0.5) * width) for i in range(20_000)) * width
        assert 0.5 - below == pytest.approx(0.025, abs=2e-5), freedom


def test_an_effect_by_hand() -> None:
    found = effect([0.1, 0.2, 0.3])
    assert (found.mean, found.spread, found.pairs) == (pytest.approx(0.2), pytest.approx(0.1), 3)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert found.sign == 0  # three seeds that all say "worse" are not enough at this spread
    assert effect([0.19, 0.2, 0.21]).sign == 1 and effect([-0.19, -0.2, -0.21]).sign == -1


def test_one_pair_says_nothing_of_its_spread() -> None:
    found = effect([0.5])
    assert (found.mean, found.spread, found.low, found.high, found.sign) == (0.5, None, None, None, 0)


def test_many_pairs_take_an_interval_that_is_too_wide_rather_than_too_narrow() -> None:
    found = effect([0.0, 1.0] * 20)
    assert found.high is not None and found.spread is not None
    assert found.high - found.mean > 2.0 * found.spread / math.sqrt(40)


def test_the_target_is_reached_between_two_validations() -> None:
    curve = [(100, 3.0, 1.0), (200, 2.0, 2.0), (300, 2.5, 3.0), (400, 1.0, 5.0)]
    assert reached(curve, 2.25) == (pytest.approx(175.0), pytest.approx(1.75))
    assert reached(curve, 1.75) == (pytest.approx(350.0), pytest.approx(4.0))
    assert reached(curve, 3.5) == (100.0, 1.0) and reached(curve, 0.9) is None and reached([], 1.0) is None
    assert loss_at(curve, 0.75) == 2.5 and loss_at(curve, 1.0) == 1.0
