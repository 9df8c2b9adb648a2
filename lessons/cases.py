"""Generated cases: beside those that teach, those that nobody thought of, and of what goes wrong the smallest.

    generated(lambda rows, length: compare(theirs, rows, length), rows=integers(0, 9), length=integers(1, 9))

The strategies are Hypothesis's. Nothing is left to chance: the same cases on every machine and every rank. Draw plain
values (sizes, seeds, names of dtypes) and make tensors of them in the function, so that a case can be said in words.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import hypothesis
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from lessons.checking import expect_number, expect_numbers
from lessons.worlds import all_agree
from shardrun.lesson import called
from shardrun.lesson.wrong import Unsolved, Wrong

__all__ = ["formula", "generated", "st"]

MOST = 60
"""Cases, of one exercise."""
SECONDS = 4.0
"""Of the processor: after so long no more are tried, and none made smaller. A busy machine tries as many."""
WAITED = 20.0
"""And after so many seconds by the clock, for a function that waits."""


class _Stop(BaseException):
    """What must end the search at once, past Hypothesis, which tries again after an Exception."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def generated(
    compare: Callable[..., None], most: int = MOST, seconds: float = SECONDS, **strategies: SearchStrategy
) -> None:
    """Call compare(**case) with generated cases; raises what it raises for the smallest case that fails.

    compare raises Wrong, with the case in its words. On several ranks all of them try the same cases and fail together:
    what one of them finds wrong all raise. An error that is no Wrong ends the search there, for the others may wait in
    the middle of it.
    """
    search = _Search(compare, seconds)
    phases = (Phase.generate,) if called.CALLS.quick else (Phase.generate, Phase.shrink)
    trial = settings(
        max_examples=most, deadline=None, database=None, report_multiple_bugs=False, derandomize=True,
        phases=phases, suppress_health_check=list(HealthCheck), print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip

    def attempt(**case: Any) -> None:
        search(case)

    try:
        with tempfile.TemporaryDirectory() as folder:  # not in the learner's
            set_hypothesis_home_dir(folder)
            with _nothing_from_files():
                trial(hypothesis.given(**strategies)(attempt))()
    except _Stop as stop:
        raise stop.error from None
    except Flaky:
        raise Wrong(f"{search.first} (But not always: does your function keep something from an earlier call?)") from (
            None
        )


def _nothing_from_files() -> AbstractContextManager[object]:
    """Hypothesis also draws constants that it finds in the files around: other cases on every machine, and slow."""
    from hypothesis.internal.conjecture import providers

    if not hasattr(providers, "_get_local_constants"):
        return nullcontext()
    return mock.patch.object(providers, "_get_local_constants", lambda: providers.Constants())


class _Search:
    """One exercise's search: its clock, and what it has seen fail."""

    def __init__(self, compare: Callable[..., None], seconds: float) -> None:
        self.compare = compare
        self.until = time.process_time() + seconds, time.monotonic() + WAITED
        self.failed: dict[str, BaseException] = {}
        self.ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def first(self) -> str:
        return str(next(iter(self.failed.values()), ""))

    def __call__(self, case: dict[str, Any]) -> None:
        key = repr(case)
        if self._late():  # nothing new; what has failed fails again
            if key in self.failed:
                raise self.failed[key]
            return
        try:
            self._try(case)
        except Exception as error:
            self.failed.setdefault(key, error)
            raise

    def _late(self) -> bool:
        late = time.process_time() > self.until[0] or time.monotonic() > self.until[1]
        if self.ranks == 1:
            return late
        vote = torch.tensor([int(late)])
        dist.broadcast(vote, 0)  # rank 0's clock is everybody's
        return bool(vote.item())

    def _try(self, case: dict[str, Any]) -> None:
        said = ""
        try:
            self.compare(**case)
        except Wrong as wrong:
            said = str(wrong)
            if self.ranks == 1:
                raise
        except Unsolved as error:
            raise _Stop(error) from None
        except Exception as error:
            if self.ranks > 1:
                raise _Stop(error) from None
            raise
        if self.ranks > 1:
            all_agree(said)


def formula(
    theirs: Callable[..., Any], right: Callable[..., Any], unit: str = "", world: str = "", /, **strategies: Any
) -> None:
    """A function that computes a number, or a dictionary of them, against another formula, on generated arguments.

    The strategies stand in the order of the parameters. unit: such as "in bytes"; world: the name of the parameter that
    is the world size, if there is one.
    """

    def compare(**case: Any) -> None:
        due = right(*case.values())
        what = ", ".join([*(f"{name} = {value}" for name, value in case.items()), *([unit] if unit else [])])
        found = theirs(*case.values())
        (expect_numbers if isinstance(due, dict) else expect_number)(found, due, what, {}, case.get(world))

    generated(compare, **strategies)
