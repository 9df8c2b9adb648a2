"""Random numbers by their place: element i of a parameter is a function of (seed, name, i) alone.

A generator that hands out one number after the other must draw all that come before the one that is wanted. A
counter-based one computes any number from its position, so a rank draws exactly the elements that it holds, and gets to
the bit what a process that draws the whole parameter gets there.

    key      128 bits of SHA-256 of (seed, name): a stream for every parameter, whatever others there are
    words    Philox-4x64 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), numpy's
             own, whose integers numpy promises to keep: word i, 64 bits, belongs to element i
    uniform  the upper 52 bits, in the middle of their cell: (k + 1/2) / 2^52, strictly between 0 and 1
    normal   the inverse of the normal distribution there, by Acklam's rational functions (2003, "An algorithm for
             computing the inverse normal cumulative distribution function"; relative error 1.2e-9, a fiftieth of
             float32's own)

All arithmetic is in float64, rounded to float32 once, at the end. It consists of sums, products, quotients and square
roots, one operation at a time, which IEEE 754 rounds alike on every processor and at every place of an array. A
logarithm it does not, and so that is summed here as a series.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Numbers = np.ndarray[Any, np.dtype[np.float64]]

WORDS = 4
"""Of 64 bits, that Philox makes of one value of its counter."""

AT_ONCE = 2**15
"""Numbers computed together: they fit a core's cache."""


def normal(seed: int, name: str, start: int, stop: int, std: float) -> Tensor:
    """Elements [start, stop) of the parameter's stream, normal with mean 0: float32 [stop − start], on the CPU."""
    return _draw(seed, name, start, stop, lambda centred: std * _normal(centred))


def uniform(seed: int, name: str, start: int, stop: int, bound: float) -> Tensor:
    """The same, uniform between −bound and bound."""
    return _draw(seed, name, start, stop, lambda centred: 2 * bound * centred)


def _draw(seed: int, name: str, start: int, stop: int, shape: Callable[[Numbers], Numbers]) -> Tensor:
    """shape: numbers between −1/2 and 1/2 → those wanted."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    stream = np.random.Philox(key=key, counter=start // WORDS)
    stream.random_raw(start % WORDS)
    result = np.empty(stop - start, dtype=np.float32)
    for first in range(0, result.size, AT_ONCE):
        part = result[first : first + AT_ONCE]
        words = stream.random_raw(part.size)
        part[:] = shape(((words >> np.uint64(12)).astype(np.float64) + (0.5 - 2.0**51)) * 2.0**-52)
    return torch.from_numpy(result)


def _normal(centred: Numbers) -> Numbers:
    """The number that a standard normal one is below with probability 1/2 + centred."""
    squares = centred * centred
    result = _polynomial(squares, MIDDLE[0])
    result /= _polynomial(squares, MIDDLE[1])
    result *= centred
    (outside,) = np.nonzero(squares > (0.5 - TAIL_BEGINS) ** 2)
    root = np.sqrt(-2 * _log(0.5 - np.abs(centred[outside])))
    size = -_polynomial(root, TAIL[0]) / _polynomial(root, TAIL[1])
    result[outside] = np.copysign(size, centred[outside])
    return result


def _log(x: Numbers) -> Numbers:
    """x = m · 2^e with m near 1, and log m = 2 (s + s³/3 + s⁵/5 + …) with s = (m − 1) / (m + 1), |s| < 0.172."""
    m, exponent = np.frexp(x)
    small = m < math.sqrt(0.5)
    m = np.where(small, 2 * m, m)
    s = (m - 1) / (m + 1)
    return (exponent - small) * math.log(2) + s * _polynomial(s * s, [2 / n for n in range(1, 16, 2)])


def _polynomial(x: Numbers, coefficients: Sequence[float]) -> Numbers:
    """coefficients: of 1, x, x², …"""
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total *= x
        total += coefficient
    return total


TAIL_BEGINS = 0.02425
"""The probability from which on inwards the middle's function holds."""

MIDDLE = (
    (
        2.506628277459239e00,
        -3.066479806614716e01,
        1.383577518672690e02,
        -2.759285104469687e02,
        2.209460984245205e02,
        -3.969683028665376e01,
    ),
    (
        1.0,
        -1.328068155288572e01,
        6.680131188771972e01,
        -1.556989798598866e02,
        1.615858368580409e02,
        -5.447609879822406e01,
    ),
)
TAIL = (
    (
        2.938163982698783e00,
        4.374664141464968e00,
        -2.549732539343734e00,
        -2.400758277161838e00,
        -3.223964580411365e-01,
        -7.784894002430293e-03,
    ),
    (
        1.0,
        3.754408661907416e00,
        2.445134137142996e00,
        3.224671290700398e-01,
        7.784695709041462e-03,
    ),
)
"""Acklam's a/b and c/d: numerator and denominator."""
