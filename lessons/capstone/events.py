"""What a rank sent while what was computed: the order of events in a step, of torch's collectives and of autograd.

    with recorded(own) as events: …
    events.messages[0].exposed

A message is *exposed* where nothing was computed between its sending and the waiting for it.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import nn

from shardrun.own import Own
from strategies.ledger.wire import Meter


@dataclass
class Message:
    """A collective with a payload. Times are numbers of events."""

    collective: str
    bytes: int
    sent: int
    asked_to_wait: bool
    """async_op was not given: the call itself waits."""
    phase: str
    """What the trainer had called: forward, backward, wait, norm, update, clear."""
    last: bool
    """In the last micro-batch of the step, or after it."""
    waited: int | None = None


@dataclass
class Events:
    """Of one step of a rank."""

    messages: list[Message] = field(default_factory=list)
    work: list[tuple[int, str]] = field(default_factory=list)
    """(time, what): a gradient that came, a module that ran."""
    time: int = 0
    phase: str = ""
    last: bool = True

    def tick(self) -> int:
        self.time += 1
        return self.time

    def exposed(self, message: Message) -> bool:
        until = self.time if message.waited is None else message.waited
        return not any(message.sent < when < until for when, _ in self.work)


class _Work:
    """A handle whose waiting is noted."""

    def __init__(self, work: Any, events: Events, messages: list[Message]) -> None:
        self._work, self._events, self._messages = work, events, messages

    def wait(self, *arguments: Any, **options: Any) -> Any:
        for message in self._messages:
            message.waited = message.waited or self._events.tick()
        return self._work.wait(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def recorded(own: Own) -> Iterator[Events]:
    """While open, every collective that the file calls through torch.distributed is noted; `watch` adds the work."""
    events = Events()
    with Meter() as meter, patched(own, lambda function: _wrapped(function, events, meter)):
        yield events


@contextmanager
def patched(
    own: Own, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], also: tuple[str, ...] = ()
) -> Iterator[None]:
    """While open, what torch.distributed has of collectives is wrapped, also what the file has imported of it.

    also: names of others that are to be, which are always waited for.
    """
    theirs = vars(sys.modules[own.path.stem])
    with ExitStack() as patches:
        for name, function in list(vars(dist).items()):
            if inspect.isfunction(function) and (name in also or "async_op" in inspect.signature(function).parameters):
                wrapped = wrap(function)
                patches.enter_context(mock.patch.object(dist, name, wrapped))
                for imported in [n for n, value in theirs.items() if value is function]:
                    patches.enter_context(mock.patch.dict(theirs, {imported: wrapped}))
        yield


def _wrapped(function: Callable[..., Any], events: Events, meter: Meter) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        before, sent = len(meter.sent), events.tick()
        work = function(*arguments, **options)
        background = bool(signature.bind(*arguments, **options).arguments.get("async_op", False))
        made = [
            Message(each.collective, each.payload_bytes, sent, not background, events.phase, events.last)
            for each in meter.sent[before:]
            if not each.bookkeeping
        ]
        events.messages += made
        if background and work is not None:
            return _Work(work, events, made)
        for message in made:
            message.waited = events.tick()
        return work

    return call


def watch(note: Callable[[str], None], model: nn.Module) -> None:
    """Note what is computed. To be called before the learner's hooks are there, so that ours come first."""
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: note(f"gradient of {name}"))


def watch_modules(note: Callable[[str], None], model: nn.Module) -> None:
    """To be called after the learner's hooks are there: a module runs once they have made it ready."""
    for path, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda _, __, path=path: note(f"{path} runs"))
