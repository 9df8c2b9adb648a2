"""The learner's function as a check calls it: every call is watched, of every exercise, so that no check can forget to.

What it was given is compared before and after, and an error that it raises is known to be its own.
"""

import functools
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shardrun.lesson.arguments import Snapshot, in_few_words
from shardrun.lesson.wrong import Unsolved, Wrong

if TYPE_CHECKING:
    from shardrun.lesson.messages.recorder import MessageRecorder


@dataclass
class Calls:
    """What is known of the calls of the learner's function in this process."""

    files: tuple[str, ...] = ()
    """Files whose lines are the learner's."""
    raised: BaseException | None = None
    """The last error that came out of a call, or out of code that runs for the learner (`on_behalf`)."""
    given: str = ""
    """The arguments of the last call, in words."""
    changed: str = ""
    """The first sentence on an argument that a call has changed, also where the check has caught it."""
    where: list[str] = field(default_factory=list)
    """What of the learner's runs outside of a call, such as a backward pass."""
    quick: bool = False
    """Whether generated cases that fail are not to be made smaller (Job.quick)."""
    recorder: "MessageRecorder | None" = None
    """What notes the messages of each call, where they are to be shown (Job.record)."""

    def recorded(self) -> AbstractContextManager[None]:
        """The call whose arguments are in `given`."""
        return self.recorder.call(self.given) if self.recorder else nullcontext()


CALLS = Calls()
"""Of this process: an exercise is checked in a process of its own."""


def watched(
    function: Callable[..., Any], names: Iterable[str] = (), allowed: Mapping[str, Iterable[str]] | None = None
) -> Callable[..., Any]:
    """The function, with its arguments compared before and after every call.

    names: of its parameters, in order; allowed: those that may change → how (shardrun/lesson/arguments.py). Where
    another has changed, that is noted in CALLS, and it is made what it was, so that the check can name what else is
    wrong; where it cannot be, Wrong is raised at once. The function's own `raise NotImplementedError` becomes Unsolved.
    """
    parameters = list(names)

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        given = {(parameters[i] if i < len(parameters) else f"argument {i + 1}"): a for i, a in enumerate(arguments)}
        given |= keywords
        CALLS.given = ", ".join(f"{name} = {in_few_words(value)}" for name, value in given.items())
        before, modes = Snapshot(given), _modes()
        try:
            with CALLS.recorded():
                found = function(*arguments, **keywords)
        except NotImplementedError as error:
            if not_begun(error):
                raise Unsolved from None
            CALLS.raised = error
            raise
        except BaseException as error:
            CALLS.raised = error
            raise
        if sentence := before.changed(allowed or {}) or _modes_changed(modes):
            CALLS.changed = CALLS.changed or sentence
            if not before.put_back(allowed or {}, found):
                raise Wrong(sentence)
        return found

    return call


@contextmanager
def on_behalf(what: str) -> Iterator[None]:
    """What runs in here is the learner's, though it is called by the check: the backward pass of what was returned.

    what: in words, for the message of an error.
    """
    CALLS.where.append(what)
    try:
        yield
    except Exception as error:
        CALLS.raised = error
        CALLS.given = what
        raise
    finally:
        CALLS.where.pop()


def not_begun(error: BaseException) -> bool:
    """Whether it is the exercise's own line `raise NotImplementedError`, not one of a library or with a text."""
    frames = traceback.extract_tb(error.__traceback__)
    if str(error) or not frames or not CALLS.files:
        return False
    last = frames[-1]
    return last.filename in CALLS.files and (last.line or "").strip().startswith("raise NotImplementedError")


def is_the_learners(error: BaseException) -> bool:
    """Whether an error came out of the learner's code, or out of something that led through it."""
    each: BaseException | None = error
    while each is not None:
        if each is CALLS.raised:
            return True
        if any(frame.filename in CALLS.files for frame in traceback.extract_tb(each.__traceback__)):
            return True
        each = each.__cause__ or each.__context__
    return False


def their_line(error: BaseException) -> str:
    """The learner's line that led to an error: "exercise.py, line 3, `x + y`"; empty where none did."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in CALLS.files:
            return f"{Path(frame.filename).name}, line {frame.lineno}, `{frame.line}`"
    return ""


def _modes() -> tuple[Any, ...]:
    return torch.is_grad_enabled(), torch.get_default_dtype()


def _modes_changed(before: tuple[Any, ...]) -> str:
    now = _modes()
    if now == before:
        return ""
    torch.set_grad_enabled(before[0])
    torch.set_default_dtype(before[1])
    if now[0] != before[0]:
        return "Your function leaves torch's gradients switched the other way: use `with torch.no_grad():`."
    return f"Your function leaves torch's default dtype at {now[1]}; it was {before[1]}."
