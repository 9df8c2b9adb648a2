"""ledger.json: what every rank of a run holds and sends. What is in it, and how it is read and judged. Plain Python.

    {"schema": 1, "step": 3, "ranks": [
        {"rank": 0, "memory": {MOMENT: {CATEGORY: LINE}}, "host memory": {MOMENT: {CATEGORY: LINE}},
         "traffic": [{"collective": …, "purpose": …, "axis": …, "calls": …, LINE}], …}]}

Rank 0 has a "timeline" too (strategies/ledger/timeline.py): what it held and sent in the course of the step.
"memory" is what the device holds; "host memory", only where something is offloaded, what lies beside it in the host's.
A LINE is {"predicted", "measured", "remainder"} in bytes, and "why" where a remainder is no surprise. Where a setting
of the engine makes a line one that is not predicted, predicted and remainder are null, and `why` names the setting.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "ledger.json"


def content(step: int, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the file holds, beside its schema. step: the one that was counted."""
    return {"step": step, "ranks": ranks}


def read(run: Path) -> dict[str, Any]:
    """The file in a run's folder. Raises FileNotFoundError where no books were kept."""
    return json.loads((run / NAME).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def before_step(rank: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A rank's memory with all gradients there (a run of one step has it only after its step)."""
    return rank["memory"].get("after backward") or rank["memory"]["after step"]  # type: ignore[no-any-return]


def fullest_rank(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one that holds most just before a step."""
    return max(ranks, key=lambda rank: sum(line["measured"] for line in before_step(rank).values()))


@dataclass(frozen=True)
class LedgerLine:
    """A line of the books: predicted and measured, in bytes; `why` where a remainder is no surprise. predicted and
    remainder are None where the line is not predicted."""

    rank: int
    what: str
    predicted: int | None
    measured: int
    remainder: int | None
    why: str = ""


def host_before_step(rank: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A rank's host memory at the moment of `before_step`; nothing where nothing is offloaded."""
    moments = rank.get("host memory", {})
    return moments.get("after backward") or moments.get("after step") or {}


def memory_lines(rank: dict[str, Any], moment: str = "after backward") -> list[LedgerLine]:
    """What a rank held at a moment, by category, on its device and then on the host; categories of which there is
    nothing are left out.
    """
    lines = [(name, entry) for name, entry in rank["memory"].get(moment, {}).items()]
    lines += [(f"{name}, on the host", e) for name, e in rank.get("host memory", {}).get(moment, {}).items()]
    return [_line(rank, name, entry) for name, entry in lines if entry["predicted"] or entry["measured"]]


def summary_lines(rank: dict[str, Any]) -> list[LedgerLine]:
    """By category just before the update; then the activations after the forward pass, and the peak as a whole."""
    lines = memory_lines(rank)
    if activations := rank["memory"].get("after forward", {}).get("activations"):
        lines.append(_line(rank, "activations, after forward", activations))
    if peak := rank["memory"].get("peak"):
        whole = added(peak)
        unknown = [entry["why"] for entry in peak.values() if entry["predicted"] is None]
        why = next((entry["why"] for entry in peak.values() if "why" in entry), "")
        why = unknown[0] if unknown else why if whole["remainder"] else ""
        lines.append(_line(rank, "everything, at the peak", {**whole, "why": why}))
    return lines


def added(entries: Mapping[str, dict[str, Any]]) -> dict[str, int | None]:
    """Lines together, as one without its `why`; nothing where there are none. What one of them does not predict, they
    do not.
    """
    return {
        key: None if any(entry[key] is None for entry in entries.values()) else sum(e[key] for e in entries.values())
        for key in ("predicted", "measured", "remainder")
        if entries
    }


def digits(bytes: int | None, sign: bool = False) -> str:
    """A number of a line, for people; a dash for what is not predicted. sign: of a remainder, which may be 0."""
    if bytes is None:
        return "–"
    return f"{bytes:+,}" if sign and bytes else f"{bytes:,}"


def traffic_lines(rank: dict[str, Any]) -> list[LedgerLine]:
    """What a rank handed to collectives in the counted step: payload, with its calls in the name."""
    return [_line(rank, collective_name(entry), entry) for entry in rank["traffic"]]


def collective_name(entry: dict[str, Any]) -> str:
    """For people: which collective, how often, along which axis of a mesh, and whether it is bookkeeping."""
    small = " (norm, flags)" if entry["purpose"] == "bookkeeping" else ""
    axis = "" if entry.get("axis", "all") == "all" else f" along {entry['axis']}"
    return f"{entry['collective']} ×{entry['calls']}{axis}{small}"


def unexplained(ranks: list[dict[str, Any]]) -> list[str]:
    """Every line of the books whose prediction is not what was measured, and that does not say why."""
    lines = [
        (f"{moment}, {line.what}", line)
        for rank in ranks
        for moment in dict.fromkeys([*rank["memory"], *rank.get("host memory", {})])
        for line in memory_lines(rank, moment)
    ]
    lines += [(f"sent: {line.what}", line) for rank in ranks for line in traffic_lines(rank)]
    return [
        f"rank {line.rank}, {what}: {line.remainder:+,} bytes"
        for what, line in lines
        if line.remainder and not line.why
    ]


def verdict(left: Sequence[str], ranks: int) -> str:
    """What the remainders come to, in a sentence. left: `unexplained`."""
    if left:
        return "NOT EXPLAINED, a mistake in the code or in our understanding: " + "; ".join(left)
    return f"Every line of all {ranks} ranks' books: predicted = measured, to the byte, but for those that say why."


def _line(rank: dict[str, Any], what: str, entry: dict[str, Any]) -> LedgerLine:
    return LedgerLine(
        rank["rank"], what, entry["predicted"], entry["measured"], entry["remainder"], entry.get("why", "")
    )
