"""Lesson 10's check of self_ms: operators within operators, in a trace of torch.profiler."""

import math

from lessons.cases import generated, st
from lessons.checking import Wrong, expect


def _event(name, ts, dur, tid=1, cat="cpu_op", ph="X"):
    return {"ph": ph, "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}


def self_ms(theirs):
    events = [
        _event("aten::addmm", 1200.0, 500.0),
        _event("aten::linear", 1000.0, 1000.0),
        _event("aten::t", 1050.0, 100.0),
        _event("aten::transpose", 1060.0, 80.0),
        _event("aten::relu", 2000.0, 300.0),
        _event("aten::mm", 1100.0, 2000.0, tid=2),
        _event("aten::linear", 4000.0, 700.0),
        _event("aten::addmm", 4000.0, 600.0),
        {"ph": "M", "name": "process_name", "pid": 1},
        _event("step", 900.0, 9000.0, cat="user_annotation"),
        {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 1300.0, "tid": 1},
    ]
    right = {
        "aten::linear": 0.5,
        "aten::addmm": 1.1,
        "aten::t": 0.02,
        "aten::transpose": 0.08,
        "aten::relu": 0.3,
        "aten::mm": 2.0,
    }
    whole = {**right, "aten::linear": 1.7, "aten::t": 0.1}
    found = theirs(events)
    expect(isinstance(found, dict), f"Your function returned {found!r}; a dictionary is asked for.")
    if "step" in found or "[memory]" in found:
        raise Wrong('Only operators are asked for: ph "X" and cat "cpu_op". You count a scope or a memory event too.')
    if absent := [name for name in right if name not in found]:
        raise Wrong(f"{absent[0]} is missing.")
    if _same(found, {name: 1000 * value for name, value in right.items()}):
        raise Wrong("Those are microseconds; milliseconds are asked for.")
    if _same(found, whole):
        raise Wrong(
            "Time is counted twice: aten::linear's 1.7 ms contain aten::addmm's 1.1. Take away what the operators that "
            "it called took."
        )
    if _close(found["aten::linear"], 1.7 - 1.1 - 0.1 - 0.08):
        raise Wrong(
            "aten::transpose lies within aten::t, which lies within aten::linear: it is aten::t's to take away, not "
            "aten::linear's too."
        )
    if found["aten::linear"] < 0 or _close(found["aten::linear"], 0.5 - 2.0):
        raise Wrong("aten::mm ran on another thread (tid): nobody on this one waited for it.")
    if _close(found["aten::linear"] + found["aten::addmm"], 0.5 + 0.5) or _close(found["aten::addmm"], 0.6):
        raise Wrong("aten::linear and aten::addmm occur twice: add up all calls of a name.")
    for name, value in right.items():
        if not _close(found[name], value):
            raise Wrong(f"{name}: you say {found[name]:g} ms, it is {value:g}.")
    expect(len(found) == len(right), f"There are entries too many: {sorted(set(found) - set(right))}.")
    tree = st.recursive(st.just([]), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=8)
    generated(
        lambda threads, gap, order, at, unit: _traced(theirs, threads, gap, order, at, unit),
        threads=st.lists(tree, max_size=2), gap=st.sampled_from([0, 1]), order=st.integers(0, 9),
        at=st.sampled_from([0.0, 5e9]), unit=st.sampled_from([1.0, 0.125]),
    )  # fmt: skip


def _traced(theirs, threads, gap, order, at, unit):
    """Operators nested as in the trees; without a gap the first child starts with its caller, and the last ends so.

    unit: of all times, in microseconds.
    """
    events, right, names = [], {}, ("a", "b", "c", "d")

    def lay(children, start, tid, depth):
        own = 3 + 2 * depth
        end = start + gap
        for child in children:
            end = lay(child, end, tid, depth + 1) + gap
        inner = end - start
        end += own * (gap or len(children) < 2)  # one child that is as long as its caller could be either
        name = names[(depth + len(children)) % 4]
        events.append(_event(name, at + start * unit, (end - start) * unit, tid))
        spent = sum(child_length for child_length in lengths.pop((tid, depth + 1), []))
        right[name] = right.get(name, 0.0) + (end - start - spent) * unit / 1e3
        lengths.setdefault((tid, depth), []).append(end - start)
        return end if inner >= 0 else start

    for tid, tree in enumerate(threads):
        lengths = {}
        lay([[], tree] if tree else tree, 10, tid, 0)
    turned = events[order % max(1, len(events)) :] + events[: order % max(1, len(events))]
    found = theirs(turned[:: 1 if order % 2 else -1])
    expect(isinstance(found, dict), f"Your function returned {found!r}; a dictionary is asked for.")
    if found.keys() == right.keys() and all(math.isclose(found[n], right[n], abs_tol=1e-6) for n in right):
        return
    told = [(e["name"], e["ts"] - at, e["dur"], e["tid"]) for e in events]
    shown = {name: round(value, 6) for name, value in found.items()}
    raise Wrong(
        f"Of (name, ts, dur, tid) {told}, in any order, you say {shown}; it is {right}. An operator lies within "
        "another also where both start, or both end, at the same time."
    )


def _close(a, b):
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def _same(a, b):
    return all(_close(a.get(name, math.inf), value) for name, value in b.items())
