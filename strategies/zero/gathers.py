"""What ZeRO-3 gathers, and when: DeepSpeed's coordinator replayed over a model's modules.

DeepSpeed records the order of modules in its first passes, forward and backward, and then follows it
(`fetch_sub_module`, `release_sub_module` and `__params_to_release` in runtime/zero/partitioned_param_coordinator.py,
0.19.8). Before each module it gathers in one call what is missing of the module's own parameters, and then, in one more
call, what comes next, as far as the prefetch bucket and the limit on live parameters allow. After the module its
parameters are let go, unless they are used again within `max_reuse` elements of modules, or a prefetch has already
passed over a later use of them. So with the default of 1e9 a smaller model is gathered once per micro-batch, not twice.

Every module that is called takes part, also one without parameters: it moves the prefetch on. Plain Python, no torch.
"""

import functools
import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from strategies.ledger.terms import Modules


class Fetched(NamedTuple):
    """One call that gathers, and what of it is still there when the forward pass ends."""

    parameters: tuple[str, ...]
    kept: tuple[str, ...]
    waited: bool
    """Whether anyone has waited for it by then: what is fetched ahead of the backward pass has no tensors yet."""


def modules_of(names: Iterable[str]) -> Modules:
    """The modules that parameters' names tell of. Misses modules without parameters and second uses of shared weights,
    neither of which matters before one of the limits does.
    """
    own: dict[str, list[str]] = {"": []}
    for name in names:
        path, parts = "", name.split(".")[:-1]
        for part, below in zip(parts, [*parts[1:], ""], strict=True):
            path = f"{path}.{part}".lstrip(".")
            if not below.isdigit():  # else a list: it holds modules and is not called
                own.setdefault(path, [])
        own[path].append(name)
    return tuple((path, tuple(parameters)) for path, parameters in own.items())


@functools.lru_cache(maxsize=64)
def gathers(
    parameters: tuple[tuple[str, int], ...],
    modules: Modules,
    persistent: frozenset[str],
    max_live: int,
    max_reuse: int,
    prefetch: int,
) -> tuple[Fetched, ...]:
    """The calls of one micro-batch in the middle of a run.

    parameters: (name, elements); modules: in the order in which they are called; persistent: parameters that stay
    whole; limits in elements.
    """
    numel = dict(parameters)
    order: list[tuple[str, ...]] = []  # the recorded trace: every module's own parameters, step by step
    events: list[tuple[bool, int]] = []  # (fetch or release, step in the trace)
    for backward in (False, True):
        open_modules: list[int] = []
        for entering, own in _walk(modules, backward):
            if entering:
                open_modules.append(len(order))
                events.append((True, len(order)))
                order.append(own)
            else:
                events.append((False, open_modules.pop()))
    before = [0, *itertools.accumulate(sum(numel[p] for p in own) for own in order)]  # elements of earlier modules
    uses: dict[str, list[int]] = {name: [] for name in numel}
    for step, own in enumerate(order):
        for parameter in own:
            uses[parameter].append(step)

    calls: list[tuple[str, ...]] = []
    waited: set[int] = set()  # of the calls
    last: dict[str, int] = {}  # a parameter's latest call
    kept: list[tuple[str, ...]] = []
    forward = len(events) // 2
    live = 0
    available = set(persistent)
    queue = [(parameter, step) for step, own in enumerate(order) for parameter in own]
    position = 0  # in the queue of what may be prefetched
    passed = dict.fromkeys(numel, -1)  # the latest use of a parameter that the queue has passed
    now = 0

    def gather(names: list[str]) -> None:
        if names:
            last.update(dict.fromkeys(names, len(calls)))
            calls.append(tuple(names))

    for number, (fetch, step) in enumerate(events):
        if number == forward:
            kept = [tuple(p for p in call if p in available and last[p] == i) for i, call in enumerate(calls)]
            done = frozenset(waited)
        if fetch:
            missing = [p for p in order[step] if p not in available]
            gather(missing)
            available.update(missing)
            waited.update(last[p] for p in order[step] if p in last)
            live += sum(numel[p] for p in missing)
            for _ in [p for p in order[step] if passed[p] < step]:
                parameter, use = queue[position]
                passed[parameter] = use
                position += 1
            upcoming: list[str] = []
            room = min(max_live - live, prefetch)
            ahead = 0
            while position < len(queue) and ahead < room:
                parameter, use = queue[position]
                passed[parameter] = max(passed[parameter], use)
                position += 1
                if parameter not in available:
                    available.add(parameter)
                    upcoming.append(parameter)
                    ahead += numel[parameter]
            gather(upcoming)
            live += ahead
            now = step + 1
        else:
            for parameter in order[step]:
                following = bisect_left(uses[parameter], now)
                again = following < len(uses[parameter])
                soon = again and before[uses[parameter][following]] - before[now] < max_reuse
                if parameter in available and not (parameter in persistent or soon or passed[parameter] > now):
                    available.discard(parameter)
                    live -= numel[parameter]
    kept += [()] * (len(calls) - len(kept))
    return tuple(Fetched(call, kept[i], i in done) for i, call in enumerate(calls))


def _walk(modules: Modules, backward: bool) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """Enter and leave every module as a forward or backward pass does: (entering, the module's own parameters)."""
    own = dict(modules)
    children: dict[str, list[str]] = {path: [] for path in own}
    for path in own:
        if path:
            parent = path.rpartition(".")[0]
            while parent not in own:  # a list
                parent = parent.rpartition(".")[0]
            children[parent].append(path)

    def visit(path: str) -> Iterator[tuple[bool, tuple[str, ...]]]:
        yield True, own[path]
        for child in reversed(children[path]) if backward else children[path]:
            yield from visit(child)
        yield False, own[path]

    return visit("")
