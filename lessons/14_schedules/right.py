"""Other right solutions of lesson 14, differently built: the check must pass them."""

import math

import numpy as np

from lessons.checking import right_attempt


@right_attempt("trapezoid")
def by_interpolation(step, steps, warmup, decay):
    down = round(decay * steps)
    up = np.interp(step, [-1, warmup], [0.0, 1.0])
    return float(up) if not down else float(min(up, np.interp(step, [steps - down, steps], [1.0, 0.0])))


@right_attempt("cosine")
def by_numpy(step, steps, warmup, final):
    if step < warmup:
        return np.float64(step + 1) / (warmup + 1)
    return final + (1 - final) * np.cos(np.pi / 2 * (step - warmup) / (steps - warmup)) ** 2


@right_attempt("compare_runs")
def with_arrays(baseline, other):
    seeds = sorted(baseline)
    differences = np.array([other[seed] for seed in seeds]) - np.array([baseline[seed] for seed in seeds])
    return differences.mean(), differences.std(ddof=1) / math.sqrt(len(seeds))


@right_attempt("spikes")
def with_nanmedian(losses, window, factor):
    array, found = np.array(losses), []
    for step in range(window, len(array)):
        before = array[step - window : step]
        middle = np.nanmedian(before)
        spread = np.nanmedian(np.abs(before - middle))
        if not array[step] <= middle + factor * spread:
            found.append(step)
    return found
