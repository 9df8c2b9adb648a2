"""What the ranks have noted, read again; and which call of the learner's function is shown. Plain Python."""

import json
from dataclasses import dataclass, field

POINT_TO_POINT = ("send", "recv")
PASSES = ("", "forward", "backward", "wait")
"""Phases in which a capstone computes, so that what travels can be hidden behind it."""


@dataclass
class SentMessage:
    """A collective, a send or a receive, as its rank saw it."""

    collective: str
    bytes: int
    """Payload; of a receive what arrives."""
    peer: int | None
    group: str
    inside: bool
    """torch has sent it from C++ (DistributedDataParallel does): the waiting for it is not seen."""
    phase: str
    waited: bool = False


@dataclass
class Call:
    """A call of the learner's function on a rank, or a step of a capstone. events: (kind, …) in their order."""

    what: str
    """The arguments, in words."""
    ranks: int
    messages: list[SentMessage] = field(default_factory=list)
    events: list[tuple[str, list[int], str]] = field(default_factory=list)
    """(sent, wait, waited, work or phase; numbers of messages; in words)."""
    done: bool = False

    @property
    def sends(self) -> list[tuple[str, int]]:
        """(collective, bytes) of all that it sends, in no order: two right solutions may differ in it."""
        return sorted((m.collective, m.bytes) for m in self.messages if m.collective != "recv")

    @property
    def computes(self) -> bool:
        return any(kind == "work" for kind, _, _ in self.events)


def read(text: str) -> list[Call]:
    """A rank's file. A last line that was cut off is left out."""
    calls: list[Call] = []
    numbers: dict[int, int] = {}
    phase = ""
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            break
        if "call" in event:
            calls.append(Call(event["call"], event["ranks"]))
            numbers, phase = {}, ""
            continue
        call = calls[-1]
        if "sent" in event:
            numbers[event["sent"]] = len(call.messages)
            told = event["collective"], event["bytes"], event.get("peer"), event["group"], event["inside"], phase
            call.messages.append(SentMessage(*told))
            call.events.append(("sent", [numbers[event["sent"]]], ""))
        elif "done" in event:
            call.done = True
        else:
            ((kind, value),) = event.items()
            of = [numbers[n] for n in value] if kind in ("wait", "waited") else []
            for n in of if kind == "waited" else ():
                call.messages[n].waited = True
            phase = value if kind == "phase" else phase
            call.events.append((kind, of, value if kind in ("work", "phase") else ""))
    return calls


Together = list[Call]
"""One call, on all ranks that took part, in their order."""


def together(recorded: tuple[str, ...]) -> list[Together]:
    """The calls of all ranks: some are of fewer ranks than there are, and count for themselves."""
    found: dict[tuple[int, int], Together] = {}
    for text in recorded:
        seen: dict[int, int] = {}
        for call in read(text):
            number = seen[call.ranks] = seen.get(call.ranks, 0) + 1
            found.setdefault((call.ranks, number), []).append(call)
    return list(found.values())


def telling(ours: list[Together], theirs: list[Together]) -> tuple[Together, Together]:
    """The call that is shown, and the solution's with the same arguments: the first that did not end or that sends
    something else; where there is none the first that sends anything. Either may be empty."""
    pairs: list[tuple[Together, Together]] = []
    for mine, other in zip(ours, theirs, strict=False):
        if [call.what for call in mine] != [call.what for call in other][: len(mine)]:
            break
        pairs.append((mine, other))
        if not all(call.done for call in mine) or [c.sends for c in mine] != [c.sends for c in other][: len(mine)]:
            return mine, other
    for mine, other in pairs:
        if any(call.messages for call in (*mine, *other)):
            return mine, other
    return ours[0] if ours else [], theirs[0] if theirs else []


def exposed(call: Call) -> set[int]:
    """Messages that were waited for with nothing computed meanwhile, in the passes of a capstone's step."""
    if not call.computes:
        return set()
    found, fresh = set[int](), set[int]()
    for kind, numbers, _ in call.events:
        if kind == "work":
            fresh.clear()
        elif kind == "sent":
            fresh.update(numbers)
        elif kind == "waited":
            found.update(n for n in numbers if n in fresh and call.messages[n].phase in PASSES)
    return found
