"""Wrong attempts at lesson 17, and what their message must say."""

import re
import statistics

from lessons.checking import wrong_attempt

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _read(text, pattern, unit=1000):
    return [(int(s), float(loss), int(ms) / unit) for s, loss, ms in re.findall(pattern, text, re.M)]


@wrong_attempt("read_record", says="a line of the run's own source")
def anywhere(text):
    return _read(text, r"step:(\d+)/.* val_loss:(\S+) .*train_time:(\d+)ms")


@wrong_attempt("read_record", says="train_time is in milliseconds")
def in_milliseconds(text):
    return _read(text, r"^step:(\d+)/.* val_loss:(\S+) .*train_time:(\d+)ms", unit=1)


@wrong_attempt("read_record", says="before the first step is missing")
def needs_a_train_loss(text):
    return _read(text, r"^step:(\d+)/.* train_loss.* val_loss:(\S+) .*train_time:(\d+)ms")


@wrong_attempt("read_record", says="a train_loss only")
def every_loss(text):
    return _read(text, r"^step:(\d+)/.*?_loss:(\S+) .*train_time:(\d+)ms")


@wrong_attempt("tokens_to_target", says="crossed on the way there")
def at_a_validation(curve, target):
    return next((tokens for tokens, loss in curve if loss <= target), None)


def _crossings(curve, target):
    for (before, above), (after, below) in zip(curve, curve[1:], strict=False):
        if above > target >= below:
            yield before + (above - target) / (above - below) * (after - before)


@wrong_attempt("tokens_to_target", says="That is the last crossing")
def last_crossing(curve, target):
    return next(iter(list(_crossings(curve, target))[::-1]), None)


@wrong_attempt("tokens_to_target", says="never reached")
def always_something(curve, target):
    return next(_crossings(curve, target), curve[-1][0])


def _steps(times):
    return [after - before for before, after in zip([0.0, *times], times, strict=False)]


@wrong_attempt("step_ms", says="leaves out the first step, which is slow")
def without_the_first(train_time_ms):
    steps = _steps(train_time_ms)
    return {"average": statistics.fmean(steps[1:]), "median": statistics.median(steps)}


@wrong_attempt("step_ms", says="median of the times so far")
def median_of_times(train_time_ms):
    return {"average": train_time_ms[-1] / len(train_time_ms), "median": statistics.median(train_time_ms)}


@wrong_attempt("step_ms", says="leaves out a step")
def one_too_few(train_time_ms):
    steps = _steps(train_time_ms)
    return {"average": train_time_ms[-1] / (len(steps) - 1), "median": statistics.median(steps)}


def _mfu(factor, attention, matrices, layers, width, length, tokens_per_second, share):
    return (factor * matrices + attention * layers * width * length) * tokens_per_second / share


@wrong_attempt("mfu", says="Backward is missing")
def forward_only(matrices, layers, width, length, tokens_per_second, gpus, peak):
    return _mfu(2, 6, matrices, layers, width, length, tokens_per_second, gpus * peak)


@wrong_attempt("mfu", says="Attention is missing")
def no_attention(matrices, layers, width, length, tokens_per_second, gpus, peak):
    return _mfu(6, 0, matrices, layers, width, length, tokens_per_second, gpus * peak)


@wrong_attempt("mfu", says="divide by their number")
def one_gpu(matrices, layers, width, length, tokens_per_second, gpus, peak):
    return _mfu(6, 6, matrices, layers, width, length, tokens_per_second, peak)


def _interval(differences, t, spread=statistics.stdev, root=True):
    mean, n = statistics.fmean(differences), len(differences)
    half = t(n) * spread(differences) / (n**0.5 if root else 1)
    return mean, mean - half, mean + half


def _differences(changed, baseline):
    return [c - b for c, b in zip(changed, baseline, strict=True)]


@wrong_attempt("paired", says="not paired")
def unpaired(changed, baseline):
    n = len(changed)
    mean = statistics.fmean(changed) - statistics.fmean(baseline)
    half = T_975[n - 2] * (statistics.variance(changed) / n + statistics.variance(baseline) / n) ** 0.5
    return mean, mean - half, mean + half


@wrong_attempt("paired", says="√n is missing")
def spread_of_one(changed, baseline):
    return _interval(_differences(changed, baseline), lambda n: T_975[n - 2], root=False)


@wrong_attempt("paired", says="1.96 promises too much")
def normal(changed, baseline):
    return _interval(_differences(changed, baseline), lambda n: 1.96)


@wrong_attempt("paired", says="divides by n − 1")
def population(changed, baseline):
    return _interval(_differences(changed, baseline), lambda n: T_975[n - 2], statistics.pstdev)


@wrong_attempt("paired", says="turned round")
def baseline_minus_changed(changed, baseline):
    return _interval(_differences(baseline, changed), lambda n: T_975[n - 2])


@wrong_attempt("read_record", says="whole ones")
def whole_seconds(text):
    return [(s, loss, ms // 1000) for s, loss, ms in _read(text, PATTERN, unit=1)]


PATTERN = r"^step:(\d+)/.* val_loss:(\S+) .*train_time:(\d+)ms"


@wrong_attempt("tokens_to_target", says="The share of the way is turned round")
def turned_round(curve, target):
    for (before, above), (after, below) in zip(curve, curve[1:], strict=False):
        if above > target >= below:
            return after - (above - target) / (above - below) * (after - before)
    return None


@wrong_attempt("tokens_to_target", says="the middle between")
def middle(curve, target):
    for (before, above), (after, below) in zip(curve, curve[1:], strict=False):
        if above > target >= below:
            return (before + after) / 2
    return None


@wrong_attempt("step_ms", says="not the lower")
def lower_median(train_time_ms):
    steps = _steps(train_time_ms)
    return {"average": train_time_ms[-1] / len(steps), "median": statistics.median_low(steps)}


@wrong_attempt("step_ms", says="Your function has changed `train_time_ms`")
def lengthened(train_time_ms):
    train_time_ms.insert(0, 0.0)
    steps = [b - a for a, b in zip(train_time_ms, train_time_ms[1:], strict=False)]
    return {"average": train_time_ms[-1] / len(steps), "median": statistics.median(steps)}


@wrong_attempt("mfu", says="half of them are masked")
def all_scores(matrices, layers, width, length, tokens_per_second, gpus, peak):
    return _mfu(6, 12, matrices, layers, width, length, tokens_per_second, gpus * peak)


@wrong_attempt("mfu", says="That is in per cent")
def per_cent(matrices, layers, width, length, tokens_per_second, gpus, peak):
    return 100 * _mfu(6, 6, matrices, layers, width, length, tokens_per_second, gpus * peak)


@wrong_attempt("paired", says="paired by the order of their losses")
def by_sorted_losses(changed, baseline):
    return _interval(_differences(sorted(changed), sorted(baseline)), lambda n: T_975[n - 2])


@wrong_attempt("paired", says="Low and high are exchanged")
def low_and_high_exchanged(changed, baseline):
    mean, low, high = _interval(_differences(changed, baseline), lambda n: T_975[n - 2])
    return mean, high, low


@wrong_attempt("paired", says="not s / √(n − 1)")
def root_of_n_less_one(changed, baseline):
    differences = _differences(changed, baseline)
    mean, n = statistics.fmean(differences), len(differences)
    half = T_975[n - 2] * statistics.stdev(differences) / (n - 1) ** 0.5
    return mean, mean - half, mean + half
