"""What a lesson's check.py and wrong.py are written with: saying what is wrong, in words.

A check is a function with the exercise's name; it gets the learner's function and returns if all is well. For anything
else it raises `Wrong` with sentences that name the mistake. In an exercise for several ranks it runs on every rank.
"""

import math
import numbers
import reprlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from shardrun.lesson.called import on_behalf
from shardrun.lesson.wrong import Unsolved, Wrong

__all__ = [
    "GB", "GIB", "MB", "MIB", "Unsolved", "Wrong", "expect", "expect_number", "expect_numbers", "expect_own",
    "expect_raises", "expect_tensor", "is_number", "is_whole", "on_behalf", "right_attempt",
    "rounded_alike", "wrong_attempt",
]  # fmt: skip

GB, GIB, MB, MIB = 10**9, 2**30, 10**6, 2**20

LARGEST = 1e300
"""No number of a lesson is as large."""

CLOSE = 1e-9
"""Numbers that differ by no more than this share are the same: floats in another order, but no term that is small."""

Attempt = TypeVar("Attempt", bound=Callable[..., Any])


def wrong_attempt(exercise: str, says: str) -> Callable[[Attempt], Attempt]:
    """Mark a function of wrong.py as a wrong solution of `exercise`; its message must contain `says`.

    `shardrun lesson verify` puts it in the place of the exercise and looks at what the learner would be told.
    """

    def mark(function: Attempt) -> Attempt:
        function.exercise, function.says = exercise, says  # type: ignore[attr-defined]
        return function

    return mark


def right_attempt(exercise: str) -> Callable[[Attempt], Attempt]:
    """Mark a function of right.py as another right solution of `exercise`: the check must pass it."""

    def mark(function: Attempt) -> Attempt:
        function.exercise = exercise  # type: ignore[attr-defined]
        return function

    return mark


def expect(condition: bool, message: str) -> None:
    """Raise Wrong with `message` unless `condition` holds."""
    if not condition:
        raise Wrong(message)


def expect_number(
    found: Any, right: float, what: str, mistakes: dict[str, float] | None = None, ranks: int | None = None
) -> None:
    """Compare a learner's number with the right one, to a billionth, and recognise the usual mistakes by their values.

    what: the number in words, with its case, for example "the gradients of 1000 parameters, in bytes"; mistakes:
    message → the value that this mistake gives; ranks: of the case, where the usual mistakes with their number are
    possible. The mistakes of units (GiB for GB, bits for bytes) and the factor 2 are recognised for every number, after
    the given ones. Where several mistakes give one value all of them are named. The right value itself is never told.
    """
    if found is None:
        raise Wrong(f"Your function returned nothing for {what}. Is the return missing?")
    if not is_number(found):
        raise Wrong(f"Your function returned {reprlib.repr(found)} for {what}; a plain number is asked for.")
    if not abs(found if is_whole(found) else float(found)) < LARGEST:  # nan is not
        what_it_is = "not a number (nan)" if found != found else "infinite, or as good as that"
        raise Wrong(
            f"Your function's result for {what} is {what_it_is}. Is something divided by zero, or overflows it?"
        )
    if _close(found, right):
        return
    start = f"You say {_shown(found)} for {what}. "
    if causes := explanations(found, right, mistakes, ranks):
        raise Wrong(start + " Or: ".join(causes))
    raise Wrong(start + f"That is too {'large' if found > right else 'small'}, and no mistake that is known here.")


def explanations(
    found: float, right: float, mistakes: dict[str, float] | None = None, ranks: int | None = None
) -> list[str]:
    """All known mistakes that give this number: the given ones first; those of ranks and units together, if none."""
    given = [text for text, value in (mistakes or {}).items() if _close(found, value) and not _close(value, right)]
    usual = {**(rank_mistakes(ranks) if ranks else {}), **USUAL}
    if given:
        return given
    if found == int(found) and right != int(right) and abs(found - right) < 1:
        return ["That is rounded, or cut to a whole number: divide with /, and round nothing."]
    return [text for text, factor in usual.items() if right and _close(found, right * factor)]


def rank_mistakes(ranks: int) -> dict[str, float]:
    """What goes wrong with a number of ranks: message → factor. On one rank nothing does."""
    if ranks < 2:
        return {}
    return {
        f"That is {ranks} times too much: of all {ranks} ranks together, or not divided by them.": float(ranks),
        f"That is a {ranks}th of it: divided by the ranks once too often.": 1 / ranks,
    }


USUAL = {
    "That is twice as much as it is: a factor 2 too many.": 2.0,
    "That is half of it: a factor 2 is missing.": 0.5,
    "That is GiB (2³⁰ bytes) where GB (10⁹ bytes) are asked for.": GB / GIB,
    "That is GB (10⁹ bytes) where GiB (2³⁰ bytes) are asked for.": GIB / GB,
    "That is MiB (2²⁰ bytes) where MB (10⁶ bytes) are asked for.": MB / MIB,
    "That is MB (10⁶ bytes) where MiB (2²⁰ bytes) are asked for.": MIB / MB,
    "That counts elements; a float32 has 4 bytes.": 0.25,
    "That is eight times too much: bits in place of bytes?": 8.0,
    "That is an eighth of it: bits taken for bytes?": 0.125,
    "That is a thousand times too much: look at the unit.": 1e3,
    "That is a thousandth of it: look at the unit.": 1e-3,
    "That is 10⁹ times too much: bytes in place of GB?": 1e9,
    "That is 10⁻⁹ of it: GB in place of bytes?": 1e-9,
}
"""Mistakes that can happen with any number of bytes: message → factor."""


def is_number(found: Any) -> bool:
    """A plain number: int, float, and numpy's like them; no truth value, no array, no tensor."""
    return isinstance(found, numbers.Real) and not isinstance(found, bool)


def is_whole(found: Any) -> bool:
    """A whole number by its type: int, and numpy's like it."""
    return isinstance(found, numbers.Integral) and not isinstance(found, bool)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-15)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if is_whole(value) or abs(value) >= 1e5 else f"{value:.6g}"


def expect_numbers(
    found: Any, right: dict[str, float], what: str, mistakes: dict[str, dict[str, float]], ranks: int | None = None
) -> None:
    """`expect_number` for every entry of a dictionary; mistakes: key → message → value."""
    if not isinstance(found, dict):
        raise Wrong(f"Your function returned {found!r} for {what}; a dictionary with {_names(right)} is asked for.")
    for key in right:
        if key not in found:
            raise Wrong(f"Your answer for {what} has no entry {key!r}; it needs {_names(right)}.")
    if extra := [key for key in found if key not in right]:
        raise Wrong(f"Your answer for {what} has an entry {extra[0]!r} too many; it needs {_names(right)}.")
    for key, value in right.items():
        expect_number(found[key], value, f"{key!r} of {what}", mistakes.get(key), ranks)


def _names(entries: dict[str, float]) -> str:
    return ", ".join(repr(key) for key in entries)


def expect_tensor(found: Any, like: Tensor, where: str = "") -> None:
    """A tensor of the type, dtype and shape of `like`, on its device; where: the case, in front of the sentence."""
    if not isinstance(found, Tensor):
        raise Wrong(f"{where}Your function returned {_kind(found)}; a tensor is asked for.")
    name = str(like.dtype).removeprefix("torch.")
    expect(found.shape == like.shape, f"{where}Your result is {list(found.shape)}; {list(like.shape)} is asked for.")
    got = str(found.dtype).removeprefix("torch.")
    expect(found.dtype == like.dtype, f"{where}Your result is in {got}; {name} is asked for.")


def rounded_alike(found: Tensor, right: Tensor, size: float = 0.0, roundings: int = 16) -> bool:
    """Whether two tensors differ by so many roundings at most, of numbers as large as `right`'s largest, or as `size`.

    size: of what the result was computed from, where that may have cancelled.
    """
    largest = max([size, *right.detach().abs().flatten().tolist()])
    off = (found.detach().double() - right.detach().double()).abs()
    return bool((off <= roundings * torch.finfo(found.dtype).eps * largest).all())


def expect_own(found: Tensor, argument: Tensor, what: str = "Your result", name: str = "its argument") -> None:
    """The result has memory of its own: writing into it must not change what it was made of."""
    shared = found.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr() and found.numel() > 0
    expect(not shared, f"{what} is a view of {name}: who writes into the one changes the other. Copy it (clone).")


def _kind(value: Any) -> str:
    """A value with its type, in words."""
    text = repr(value)
    return f"{text if len(text) < 60 else text[:58] + ' …'} ({type(value).__name__})"


def expect_raises(run: Callable[[], Any], kind: type[Exception], message: str) -> None:
    """`run` must raise that kind of error; message: what to say if it does not, {found} being what it returns."""
    try:
        found = run()
    except kind:
        return
    raise Wrong(message.format(found=found))
