"""Wrong attempts at lesson 14, and what their message must say."""

import math
from statistics import mean, median, pstdev, stdev

from lessons.checking import wrong_attempt


@wrong_attempt("trapezoid", says="first step has a rate of zero")
def from_zero(step, steps, warmup, decay):
    down = round(decay * steps)
    return min(step / warmup if warmup else 1.0, 1.0, (steps - step) / down if down else 1.0)


@wrong_attempt("trapezoid", says="last step has a rate of zero")
def to_zero(step, steps, warmup, decay):
    down = round(decay * steps)
    return min((step + 1) / (warmup + 1), 1.0, (steps - 1 - step) / down if down else 1.0)


@wrong_attempt("trapezoid", says="there is no warm-down")
def never_down(step, steps, warmup, decay):
    return min(1.0, (step + 1) / (warmup + 1))


@wrong_attempt("cosine", says="the cosine begins at step 0")
def warm_up_not_taken_off(step, steps, warmup, final):
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps))


@wrong_attempt("cosine", says="the floor is cut off")
def floor_by_max(step, steps, warmup, final):
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(final, 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


@wrong_attempt("cosine", says="above one")
def floor_on_top(step, steps, warmup, final):
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return final + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@wrong_attempt("mean_multiplier", says="a mean of a half, not of nothing")
def nothing_in_between(warmup, decay):
    return {"constant": 1 - warmup, "trapezoid": 1 - warmup - decay, "cosine": 0.5}


@wrong_attempt("mean_multiplier", says="The warm-up counts too")
def after_warm_up(warmup, decay):
    return {"constant": 1 - warmup / 2, "trapezoid": 1 - warmup / 2 - decay / 2, "cosine": (1 - warmup) / 2}


@wrong_attempt("branch_steps", says="need not be run again")
def every_budget_anew(budgets, decay):
    return {"cosine": sum(budgets), "trapezoid": sum(budgets)}


@wrong_attempt("branch_steps", says="not what a shorter cosine ends with")
def read_off_on_the_way(budgets, decay):
    return {"cosine": max(budgets), "trapezoid": max(budgets)}


@wrong_attempt("branch_steps", says="counted twice")
def longest_twice(budgets, decay):
    return {"cosine": sum(budgets), "trapezoid": max(budgets) + sum(decay * budget for budget in budgets)}


@wrong_attempt("compare_runs", says="pair them by seed")
def by_order(baseline, other):
    differences = [b - a for a, b in zip(baseline.values(), other.values(), strict=True)]
    return mean(differences), stdev(differences) / math.sqrt(len(differences))


@wrong_attempt("compare_runs", says="√n smaller")
def deviation(baseline, other):
    differences = [other[seed] - baseline[seed] for seed in baseline]
    return mean(differences), stdev(differences)


@wrong_attempt("compare_runs", says="divides by n − 1")
def of_the_population(baseline, other):
    differences = [other[seed] - baseline[seed] for seed in baseline]
    return mean(differences), pstdev(differences) / math.sqrt(len(differences))


@wrong_attempt("spikes", says="The first spike hides the second")
def by_mean(losses, window, factor):
    found = []
    for step in range(window, len(losses)):
        before = losses[step - window : step]
        if math.isnan(losses[step]) or losses[step] > mean(before) + factor / 2 * stdev(before):
            found.append(step)
    return found


@wrong_attempt("spikes", says="The nan was passed over")
def nan_is_overlooked(losses, window, factor):
    found = []
    for step in range(window, len(losses)):
        before = [loss for loss in losses[step - window : step] if not math.isnan(loss)]
        middle = median(before)
        if losses[step] > middle + factor * median(abs(loss - middle) for loss in before):
            found.append(step)
    return found


@wrong_attempt("spikes", says="A loss below the others is no spike")
def both_ways(losses, window, factor):
    found = []
    for step in range(window, len(losses)):
        before = [loss for loss in losses[step - window : step] if not math.isnan(loss)]
        middle = median(before)
        if not abs(losses[step] - middle) <= factor * median(abs(loss - middle) for loss in before):
            found.append(step)
    return found


def _down(step, steps, warmup, down):
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return min(1.0, (steps - step) / down) if down else 1.0


@wrong_attempt("trapezoid", says="a half goes to the even number")
def half_up(step, steps, warmup, decay):
    down = int(decay * steps + 0.5)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return min(1.0, (steps - step) / down) if down else 1.0


@wrong_attempt("trapezoid", says="not cut off")
def cut_off(step, steps, warmup, decay):
    return _down(step, steps, warmup, int(decay * steps))


@wrong_attempt("trapezoid", says="a whole number of steps")
def never_rounded(step, steps, warmup, decay):
    return _down(step, steps, warmup, decay * steps)


@wrong_attempt("trapezoid", says="warm-up included")
def share_of_the_rest(step, steps, warmup, decay):
    return _down(step, steps, warmup, decay * (steps - warmup))


@wrong_attempt("cosine", says="Half of one is asked for")
def whole_period(step, steps, warmup, final):
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(2 * math.pi * (step - warmup) / (steps - warmup)))


@wrong_attempt("cosine", says="never ends at `final`")
def down_to_zero(step, steps, warmup, final):
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _mean(warmup, decay, **other):
    right = {"constant": 1 - warmup / 2, "trapezoid": 1 - warmup / 2 - decay / 2, "cosine": 0.5}
    return {**right, **other}


@wrong_attempt("mean_multiplier", says="The warm-down is missing")
def no_warm_down(warmup, decay):
    return _mean(warmup, decay, trapezoid=1 - warmup / 2)


@wrong_attempt("mean_multiplier", says="The warm-up is missing")
def no_warm_up(warmup, decay):
    return _mean(warmup, decay, constant=1.0)


@wrong_attempt("mean_multiplier", says="not 2/π")
def a_sine(warmup, decay):
    return _mean(warmup, decay, cosine=warmup / 2 + (1 - warmup) * 2 / math.pi)


@wrong_attempt("branch_steps", says="a share of its own budget")
def longest_warm_down(budgets, decay):
    longest = max(budgets)
    return {"cosine": sum(budgets), "trapezoid": (1 - decay) * longest + decay * longest * len(budgets)}


@wrong_attempt("branch_steps", says="Your function has changed `budgets`")
def sorts_them(budgets, decay):
    budgets.sort()
    return {"cosine": sum(budgets), "trapezoid": (1 - decay) * budgets[-1] + decay * sum(budgets)}


@wrong_attempt("compare_runs", says="not paired")
def unpaired(baseline, other):
    n = len(baseline)
    spread = (stdev(baseline.values()) ** 2 + stdev(other.values()) ** 2) / n
    return mean(other.values()) - mean(baseline.values()), math.sqrt(spread)


@wrong_attempt("compare_runs", says="Your function has changed `other`")
def takes_them_out(baseline, other):
    differences = [other.pop(seed) - loss for seed, loss in baseline.items()]
    return mean(differences), stdev(differences) / math.sqrt(len(differences))


def _spiking(losses, window, factor, first):
    found = []
    for step in range(first, len(losses)):
        before = [loss for loss in losses[max(0, step - window) : step] if not math.isnan(loss)]
        middle = median(before)
        if math.isnan(losses[step]) or losses[step] > middle + factor * median(abs(loss - middle) for loss in before):
            found.append(step)
    return found


@wrong_attempt("spikes", says="Only steps with a whole window")
def from_the_start(losses, window, factor):
    return [0] * (losses[0] > 5) + _spiking(losses, window, factor, 1)


@wrong_attempt("spikes", says="Your function has changed `losses`")
def repaired_in_place(losses, window, factor):
    found = _spiking(losses, window, factor, window)
    for step in found:
        losses[step] = losses[step - 1]
    return found


@wrong_attempt("trapezoid", says="With 3000 steps")
def never_below_a_thousandth(step, steps, warmup, decay):
    return max(1e-3, _down(step, steps, warmup, round(decay * steps)))


@wrong_attempt("spikes", says="A spike of little more than 8 deviations")
def deviation_as_of_a_normal_distribution(losses, window, factor):
    return _spiking(losses, window, 1.4826 * factor, window)
