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
