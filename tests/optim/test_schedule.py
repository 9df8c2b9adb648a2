"""Schedules: their ends, their shape, and that nothing jumps."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedrun.config import OptimizerConfig, ScheduleConfig
from speedrun.optim.schedule import adamw_updates, learning_rate_multiplier, muon_momentum

NAMES = ("trapezoid", "cosine", "cosine_warmdown", "linear", "constant")


def curve(config: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate_multiplier(config, step, steps) for step in range(steps)]


@given(
    st.sampled_from(NAMES),
    st.integers(0, 20),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.integers(1, 200),
)
def test_a_schedule_rises_once_then_never_rises_and_stays_within_its_ends(
    name: str, warmup: int, decay: float, final: float, steps: int
) -> None:
    values = curve(ScheduleConfig(name, warmup, decay, final), steps)  # type: ignore[arg-type]
    assert all(0 < value <= 1 for value in values[:warmup])
    assert all(a < b for a, b in zip(values[:warmup], values[1:warmup], strict=False))
    assert all(a >= b for a, b in zip(values[warmup:], values[warmup + 1 :], strict=False))
    assert all(final - 1e-12 <= value <= 1 for value in values[warmup:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", (0, 1, 10))
def test_after_the_warm_up_it_begins_at_one_and_no_step_jumps(name: str, warmup: int) -> None:
    values = curve(ScheduleConfig(name, warmup, 0.4, 0.1), 1000)  # type: ignore[arg-type]
    assert values[warmup] == 1.0
    assert values[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)])
    assert all(abs(a - b) < 0.004 for a, b in zip(values[warmup:], values[warmup + 1 :], strict=False))


@pytest.mark.parametrize("name", NAMES[:4])
@pytest.mark.parametrize("final", (0.0, 0.1))
def test_it_ends_one_step_short_of_final(name: str, final: float) -> None:
    """`final` would be reached at step `steps`, the first that is not taken: a last step at zero would be wasted."""
    config = ScheduleConfig(name, 5, 0.5, final)  # type: ignore[arg-type]
    assert learning_rate_multiplier(config, 200, 200) == pytest.approx(final)
    assert final < learning_rate_multiplier(config, 199, 200) < final + 0.02


def test_the_forms() -> None:
    steps, warmup = 110, 10
    middle = warmup + 50
    assert learning_rate_multiplier(ScheduleConfig("constant", warmup), 109, steps) == 1.0
    assert learning_rate_multiplier(ScheduleConfig("linear", warmup, final=0.2), middle, steps) == pytest.approx(0.6)
    assert learning_rate_multiplier(ScheduleConfig("cosine", warmup, final=0.2), middle, steps) == pytest.approx(0.6)
    quarter = 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate_multiplier(ScheduleConfig("cosine", warmup, final=0.2), 35, steps) == pytest.approx(quarter)
    trapezoid = curve(ScheduleConfig("trapezoid", warmup, decay=0.4), steps)
    assert trapezoid[10:67] == [1.0] * 57 and trapezoid[67] < 1.0  # the last 44 steps decay
    assert trapezoid[66 + 22] == pytest.approx(0.5)
    assert all(a - b == pytest.approx(1 / 44) for a, b in zip(trapezoid[66:], trapezoid[67:], strict=False))


def test_a_decay_over_the_whole_run_is_linear_and_one_over_nothing_is_constant() -> None:
    assert curve(ScheduleConfig("trapezoid", 7, 1.0, 0.1), 50) == curve(ScheduleConfig("linear", 7, final=0.1), 50)
    assert curve(ScheduleConfig("trapezoid", 7, 0.0), 50) == curve(ScheduleConfig("constant", 7), 50)


def test_muons_momentum_warms_up_in_a_line() -> None:
    config = OptimizerConfig(muon_momentum=0.95, muon_momentum_start=0.85, muon_momentum_warmup=300)
    steps = 20_000
    assert muon_momentum(config, 0, steps) == 0.85
    assert muon_momentum(config, 150, steps) == pytest.approx(0.9)
    assert muon_momentum(config, 300, steps) == muon_momentum(config, 10_000, steps) == pytest.approx(0.95)
    assert muon_momentum(OptimizerConfig(muon_momentum_warmup=0), 0, steps) == pytest.approx(0.95)
    assert muon_momentum(config, 300, steps, full=0.9) == pytest.approx(0.9)


def test_and_cools_down_at_the_end() -> None:
    config = OptimizerConfig(muon_momentum_warmup=10, muon_momentum_cooldown=20)
    assert muon_momentum(config, 80, 100) == pytest.approx(0.95)
    assert muon_momentum(config, 90, 100) == pytest.approx(0.9)
    assert muon_momentum(config, 99, 100) == pytest.approx(0.855)


def test_adamw_updates_at_the_end_of_every_few_steps() -> None:
    assert [adamw_updates(OptimizerConfig(adamw_every=2), step) for step in range(4)] == [False, True] * 2
    assert all(adamw_updates(OptimizerConfig(), step) for step in range(3))


def test_cosine_with_a_warm_down_is_nine_tenths_of_a_cosine_and_a_line() -> None:
    config = ScheduleConfig("cosine_warmdown", warmup=10, decay=0.2, final=0.5)
    cosine = curve(ScheduleConfig("cosine", warmup=10, final=0.55), 90)  # the same cosine as a run of its own
    assert curve(config, 112)[:90] == pytest.approx(cosine)
    assert learning_rate_multiplier(config, 90, 112) == pytest.approx(0.55)
    assert learning_rate_multiplier(config, 101, 112) == pytest.approx(0.525)
