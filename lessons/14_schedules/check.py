"""Checks of lesson 14."""

import math

from lessons.cases import generated, st
from lessons.checking import Wrong, expect, expect_numbers, is_number


def _close(found, right):
    return is_number(found) and math.isclose(found, right, rel_tol=1e-9, abs_tol=1e-12)


def _curve(theirs, steps, *rest):
    found = [theirs(step, steps, *rest) for step in range(steps)]
    for value in found:
        expect(is_number(value), f"Your function returned {value!r}; a plain number is asked for.")
    return found


def trapezoid(theirs):
    for steps, warmup, decay in (
        (10, 0, 0.4),
        (20, 4, 0.5),
        (12, 3, 0.25),
        (8, 2, 0.0),
        (10, 0, 0.29),
        (11, 2, 0.33),
        (9, 1, 0.4),
        (10, 1, 0.25),
        (3000, 5, 0.9),
    ):
        found = _curve(theirs, steps, warmup, decay)
        down = round(decay * steps)
        right = [
            (step + 1) / (warmup + 1) if step < warmup else min(1.0, (steps - step) / down) if down else 1.0
            for step in range(steps)
        ]
        if all(map(_close, found, right)):
            continue
        where = f"With {steps} steps, warm-up {warmup}, decay {decay}: "
        _warm_up(found, warmup, where)
        if down:
            first = steps - down
            if all(_close(found[step], (steps - 1 - step) / (down - 1)) for step in range(first, steps)):
                raise Wrong(where + "the last step has a rate of zero and is wasted: zero is due one step later.")
            if all(_close(found[step], (steps - 1 - step) / down) for step in range(first, steps)):
                raise Wrong(where + "the last step has a rate of zero and is wasted: zero is due one step later.")
            if all(value >= 1 - 1e-9 for value in found[warmup:]):
                raise Wrong(where + f"there is no warm-down; it begins at step {first}.")
            if all(_close(found[step], (step - first) / down) for step in range(first, steps)):
                raise Wrong(where + "the warm-down goes up.")
            share = [min(1.0, (steps - step) / (decay * (steps - warmup))) for step in range(warmup, steps)]
            if warmup and all(map(_close, found[warmup:], share)):
                raise Wrong(where + "decay is a share of all steps, warm-up included.")
            for message, length in {
                "decay · steps is rounded to the nearest whole number of steps, not cut off (int).": int(decay * steps),
                "the warm-down has a whole number of steps: round(decay · steps).": decay * steps,
                "decay · steps is rounded to the nearest, not up; a half goes to the even number, as round does it.": (
                    math.ceil(decay * steps)
                ),
            }.items():
                other = [min(1.0, (steps - step) / length) if length else 1.0 for step in range(warmup, steps)]
                if all(map(_close, found[warmup:], other)):
                    raise Wrong(where + message)
            half = 0.5 * (1 + math.cos(math.pi * (1 / down)))
            if down > 2 and _close(found[first + 1], half):
                raise Wrong(where + "the warm-down is a cosine; a line is asked for.")
        _first_difference(found, right, where)
    generated(
        lambda steps, share, decay: _line(theirs, steps, int(share * steps * (1 - decay)), decay), most=100,
        steps=st.integers(1, 40), share=st.sampled_from([0.0, 0.2, 0.5]), decay=st.floats(0, 1),
    )  # fmt: skip


def _line(theirs, steps, warmup, decay):
    """The smallest of three lines."""
    down = round(decay * steps)
    warmup = min(warmup, steps - down)
    where = f"With {steps} steps, warm-up {warmup}, decay {decay}: "
    right = [min((s + 1) / (warmup + 1), 1.0, (steps - s) / max(down, 1e-9)) for s in range(steps)]
    found = _curve(theirs, steps, warmup, decay)
    if not all(map(_close, found, right)):
        _first_difference(found, right, where)


def _warm_up(found, warmup, where):
    """Mistakes in the part that both schedules share."""
    if not warmup:
        return
    if _close(found[0], 0.0):
        raise Wrong(where + "the first step has a rate of zero and is wasted. The line's zero lies at step −1.")
    if all(value >= 1 - 1e-9 for value in found[:warmup]):
        raise Wrong(where + "there is no warm-up.")
    if all(_close(found[step], (step + 1) / warmup) for step in range(warmup)):
        raise Wrong(
            where + "one is reached a step too early: the warm-up steps are below one, step `warmup` is at one."
        )


def _first_difference(found, right, where):
    step = next(i for i, pair in enumerate(zip(found, right, strict=True)) if not _close(*pair))
    raise Wrong(where + f"at step {step} you say {found[step]:.6g}; it is {right[step]:.6g}.")


def cosine(theirs):
    for steps, warmup, final in ((10, 0, 0.0), (20, 4, 0.1), (9, 3, 0.5), (3000, 5, 0.0)):
        _cosine(_curve(theirs, steps, warmup, final), steps, warmup, final)
    generated(
        lambda steps, share, final: _cosine(
            _curve(theirs, steps, int(share * steps), final), steps, int(share * steps), final
        ),
        steps=st.integers(1, 40), share=st.sampled_from([0.0, 0.2, 0.5, 0.9]), final=st.floats(0, 1),
    )  # fmt: skip


def _cosine(found, steps, warmup, final):
    def wave(progress):
        return 0.5 * (1 + math.cos(math.pi * progress))

    def shape(step):
        return wave((step - warmup) / (steps - warmup))

    def curve(value):
        return [(s + 1) / (warmup + 1) if s < warmup else value(s) for s in range(steps)]

    right = curve(lambda step: final + (1 - final) * shape(step))
    if all(map(_close, found, right)):
        return
    where = f"With {steps} steps, warm-up {warmup}, final {final}: "
    _warm_up(found, warmup, where)
    others = {
        "it starts from zero: the sign inside 1 + cos is wrong.": lambda step: final + (1 - final) * (1 - shape(step)),
        "the floor is cut off (max) where the curve should end in it.": lambda step: max(final, shape(step)),
        "final is added on top: at its peak the factor is above one.": lambda step: final + shape(step),
        "it never ends at `final`, but at zero.": shape,
        "the cosine begins at step 0; it begins when the warm-up is over.": lambda step: (
            final + (1 - final) * wave(step / steps)
        ),
        "it is a whole period: up again in the end. Half of one is asked for.": lambda step: (
            final + (1 - final) * wave(2 * (step - warmup) / (steps - warmup))
        ),
    }
    for message, value in others.items():
        if all(map(_close, found, curve(value))):
            raise Wrong(where + message)
    _first_difference(found, right, where)


def mean_multiplier(theirs):
    for w, d in ((0.1, 0.4), (0.02, 0.6)):
        mistakes = {
            "constant": {
                "The warm-up has a mean of a half, not of nothing.": 1 - w,
                "The warm-up is missing: it costs half of its share.": 1.0,
            },
            "trapezoid": {
                "The warm-down has a mean of a half, not of nothing.": 1 - w / 2 - d,
                "Warm-up and warm-down have a mean of a half, not of nothing.": 1 - w - d,
                "The warm-down is missing.": 1 - w / 2,
                "The warm-up is missing: it costs half of its share.": 1 - d / 2,
            },
            "cosine": {
                "The warm-up counts too, with a mean of a half.": (1 - w) / 2,
                "That is all of the warm-up; its mean is a half.": w + (1 - w) / 2,
                "Half a cosine from one to zero has a mean of 1/2 (it is as long above as below), not 2/π.": (
                    w / 2 + (1 - w) * 2 / math.pi
                ),
            },
        }
        right = {"constant": 1 - w / 2, "trapezoid": 1 - w / 2 - d / 2, "cosine": 0.5}
        expect_numbers(theirs(w, d), right, f"warm-up {w:.0%} and decay {d:.0%} of the run", mistakes)
    shares = st.integers(0, 50).map(lambda n: n / 100)
    generated(lambda w, d: _means(theirs, w, d), w=shares, d=shares)


def _means(theirs, w, d):
    """Areas: of rectangles and triangles."""
    flat = (1 - w) + w / 2
    right = {"constant": flat, "trapezoid": flat - d + d / 2, "cosine": w / 2 + (1 - w) / 2}
    expect_numbers(theirs(w, d), right, f"warm-up {w} and decay {d} of the run", {})


def branch_steps(theirs):
    for budgets, d in (([1000, 2000, 4000], 0.2), ([3000, 1000], 0.4)):
        longest, together = max(budgets), sum(budgets)
        mistakes = {
            "cosine": {
                "That is the longest run alone. On the way a cosine's rate is still high: its loss there is not what a "
                "shorter cosine ends with.": longest,
            },
            "trapezoid": {
                "The constant part is the same for all budgets: it need not be run again for each.": together,
                "The longest budget's warm-down is counted twice.": longest + d * together,
                "Each budget's warm-down is missing: the loss falls in it.": longest,
                "That has the longest's constant part alone.": (1 - d) * longest,
                "Every branch has the longest's warm-down there; it is a share of its own budget.": (
                    (1 - d) * longest + d * longest * len(budgets)
                ),
            },
        }
        right = {"cosine": together, "trapezoid": (1 - d) * longest + d * together}
        expect_numbers(theirs(budgets, d), right, f"budgets {budgets} and decay {d}, in steps", mistakes)
    generated(
        lambda budgets, d: _branches(theirs, budgets, d / 100),
        budgets=st.lists(st.integers(1, 10_000), min_size=1, max_size=5, unique=True), d=st.integers(0, 100),
    )  # fmt: skip


def _branches(theirs, budgets, d):
    right = {"cosine": sum(budgets), "trapezoid": max(budgets) - d * max(budgets) + sum(d * b for b in budgets)}
    expect_numbers(theirs(budgets, d), right, f"budgets {budgets} and decay {d}, in steps", {})


def compare_runs(theirs):
    cases = (
        ({1: 2.00, 2: 2.10, 3: 1.95}, {3: 1.93, 1: 1.99, 2: 2.07}),
        ({5: 3.0, 6: 3.5}, {6: 3.6, 5: 3.3}),
    )
    for baseline, other in cases:
        differences = [other[seed] - baseline[seed] for seed in baseline]
        n = len(differences)
        average = sum(differences) / n
        squares = sum((d - average) ** 2 for d in differences)
        right = average, math.sqrt(squares / (n - 1) / n)
        found = theirs(baseline, other)
        where = f"For {baseline} and {other} you say {found}. "
        expect(
            isinstance(found, tuple) and len(found) == 2,
            f"Your function returned {found!r}; two numbers are asked for: mean and standard error.",
        )
        if _close(found[0], right[0]) and _close(found[1], right[1]):
            continue
        expect(not _close(found[0], -average), where + "The sign is the other way round: other − baseline.")
        expect(_close(found[0], average), where + f"The mean difference is {average:.4f}.")
        by_order = [b - a for a, b in zip(baseline.values(), other.values(), strict=True)]
        unpaired = math.sqrt(_variance(baseline.values()) / n + _variance(other.values()) / n)
        for message, value in {
            "The runs are paired by their order in the dictionaries; pair them by seed.": math.sqrt(
                _variance(by_order) / n
            ),
            "That is the standard deviation of the differences; that of their mean is √n smaller.": math.sqrt(
                squares / (n - 1)
            ),
            "That divides by n; a standard deviation from a sample divides by n − 1.": math.sqrt(squares / n / n),
            "That is for runs that are not paired. Seed by seed the two had the same data: take differences first.": (
                unpaired
            ),
        }.items():
            expect(not _close(found[1], value), where + message)
        raise Wrong(where + f"The mean is right; the standard error is {right[1]:.6f}.")
    generated(
        lambda runs, turn: _compared(theirs, runs, turn), turn=st.booleans(),
        runs=st.dictionaries(
            st.integers(0, 99), st.tuples(st.integers(10, 40), st.integers(10, 40)), min_size=2, max_size=6
        ),
    )  # fmt: skip


def _compared(theirs, runs, turn):
    baseline = {seed: a / 10 for seed, (a, _) in runs.items()}
    other = {seed: runs[seed][1] / 10 for seed in sorted(runs, reverse=turn)}
    n, differences = len(runs), [(b - a) / 10 for a, b in runs.values()]
    average = sum(differences) / n
    squares = sum(d * d for d in differences) - n * average**2
    right = average, math.sqrt(max(0.0, squares) / (n * (n - 1)))
    found = theirs(baseline, other)
    same = isinstance(found, tuple) and len(found) == 2 and all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-8) for a, b in zip(found, right, strict=True)
    )  # fmt: skip
    expect(same, f"For {baseline} and {other} you say {found}; it is {right}.")


def _variance(values):
    values = list(values)
    average = sum(values) / len(values)
    return sum((value - average) ** 2 for value in values) / (len(values) - 1)


def spikes(theirs):
    nan = math.nan
    calm = [3.0, 2.9, 3.02, 2.88, 2.95, 2.9, 2.86, 2.93]
    cases = [
        ("a curve without spikes", [*calm, 2.85, 2.8, 2.82], []),
        ("one spike", [*calm, 9.0, 2.84, 2.8], [8]),
        ("two spikes within a window", [*calm, 60.0, 2.84, 4.0, 2.8], [8, 10]),
        ("a loss that falls", [*calm, 1.0, 2.84], []),
        ("a nan, and a spike behind it", [*calm, nan, 2.84, 5.0], [8, 10]),
        ("a spike of little more than 8 deviations, 3.195", [*calm, 3.25, 2.84], [8]),
        ("a loss of little less than 8 deviations, 3.195", [*calm, 3.15, 2.84], []),
        ("a loss that is infinite", [*calm, math.inf, 2.84], [8]),
        ("noise at the very start", [9.0, 3.0, 2.9, 3.02, 2.88, 2.95, 2.9, 2.86, 2.93], []),
    ]
    for what, losses, right in cases:
        found = theirs(losses, 6, 8.0)
        expect(isinstance(found, list), f"Your function returned {found!r}; a list of steps is asked for.")
        if found == right:
            continue
        where = f"{what[0].upper()}{what[1:]}, {losses[-4:]} at the end: you say {found}, it should be {right}. "
        if "falls" in what:
            raise Wrong(where + "A loss below the others is no spike.")
        if "start" in what:
            raise Wrong(where + "Only steps with a whole window before them are asked for.")
        if "nan" in what and 8 not in found:
            raise Wrong(where + "The nan was passed over: every comparison with it is False.")
        if "nan" in what:
            raise Wrong(where + "The nan is in the window of what follows, and makes its median nan: leave it out.")
        if what.startswith("two") and found == [8]:
            raise Wrong(
                where
                + "The first spike hides the second: a mean and a standard deviation are moved by it. Medians are not."
            )
        if found == [step - 1 for step in right] or found == [step + 1 for step in right]:
            raise Wrong(where + "The steps are off by one: they count from 0.")
        raise Wrong(where.strip())
    generated(
        lambda losses, window, factor: _spiked(theirs, losses, window, factor), most=150,
        losses=st.lists(st.sampled_from(LOSSES), max_size=9), window=st.integers(1, 5),
        factor=st.sampled_from([0.5, 1.0, 2.0]),
    )  # fmt: skip


LOSSES = [1.0, 1.5, 2.0, 2.0000001, 2.5, 3.0, 4.0, 5.0, 9.0, math.nan]


def _middle(values):
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _spiked(theirs, losses, window, factor):
    right = []
    for step in range(window, len(losses)):
        before = [loss for loss in losses[step - window : step] if loss == loss]
        if not before:
            return  # no median: not asked for
        limit = _middle(before) + factor * _middle([abs(loss - _middle(before)) for loss in before])
        if not losses[step] <= limit:
            right.append(step)
    found = theirs(losses, window, factor)
    expect(found == right, f"For {losses}, window {window}, factor {factor:g} you say {found}; it is {right}.")
