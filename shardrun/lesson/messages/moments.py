"""The columns of the picture: an order of the events of all ranks. No clock is asked.

On a rank each event comes after the one before. Nobody has got a message before it was sent: a receive ends after its
send, a collective after all its ranks have called it. So who comes too early is seen to wait.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from shardrun.lesson.messages.read import POINT_TO_POINT, Call, SentMessage, Together, exposed


@dataclass
class Flight:
    """A message from its sending to the end of the waiting for it, columns included."""

    message: SentMessage
    first: int
    last: int
    exposed: bool = False


@dataclass
class Row:
    """A rank."""

    rank: int
    bars: list[Flight] = field(default_factory=list)
    work: dict[int, str] = field(default_factory=dict)
    """Column → what is computed."""
    waits: list[tuple[int, int]] = field(default_factory=list)
    """First and last column of a waiting."""
    phases: list[tuple[int, str]] = field(default_factory=list)
    ended: bool = True


@dataclass
class Moments:
    """A picture without places; columns: how many there are."""

    rows: list[Row]
    columns: int

    @property
    def computes(self) -> bool:
        return any(row.work for row in self.rows)


class _Rank:
    """How far a rank has been placed."""

    def __init__(self, rank: int, call: Call) -> None:
        self.call, self.row = call, Row(rank, ended=call.done)
        self.next = self.column = 0
        """Of its events; the first free column."""
        self.sent: dict[int, int] = {}
        self.waits_from: int | None = None

    @property
    def left(self) -> bool:
        return self.next < len(self.call.events)


def place(ranks: Together) -> Moments:
    """Give every event its column."""
    placed = [_Rank(rank, call) for rank, call in enumerate(ranks)]
    needed = _needed(ranks)
    while any(rank.left for rank in placed):
        moved = False
        for rank in placed:
            while rank.left and (after := _ready(rank, placed, needed)) is not None:
                _place(rank, after)
                moved = True
        if not moved:  # what is waited for was never sent, and yet it came: shown without its cause
            _place(next(rank for rank in placed if rank.left), 0)
    # Who waits for ever is given a column to be seen waiting in.
    columns = max((rank.column + (rank.waits_from is not None) for rank in placed), default=0)
    for rank in placed:
        rank.row.phases = [(column, name) for column, name in rank.row.phases if column < columns]
        _finish(rank, columns)
    return Moments([rank.row for rank in placed], columns)


Needed = dict[tuple[int, int], list[tuple[int, int]]]
"""(rank, message) → the messages that must have been sent before it is there."""


def _needed(ranks: Together) -> Needed:
    """Collectives of a group belong together in their order, and so do the sends and receives of two ranks."""
    sends: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    calls: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    found: Needed = {}
    for rank, call in enumerate(ranks):
        count: dict[str, int] = defaultdict(int)
        for number, message in enumerate(call.messages):
            if message.collective == "send" and message.peer is not None:
                sends[rank, message.peer].append((rank, number))
            elif message.collective not in POINT_TO_POINT:
                calls[message.group, count[message.group]].append((rank, number))
                count[message.group] += 1
    for each in calls.values():
        found.update(dict.fromkeys(each, each))
    for rank, call in enumerate(ranks):
        received: dict[int | None, int] = defaultdict(int)
        for number, message in enumerate(call.messages):
            if message.collective == "recv":
                source = sends.get((message.peer, rank), []) if message.peer is not None else []
                found[rank, number] = source[received[message.peer] :][:1]
                received[message.peer] += 1
    return found


def _ready(rank: _Rank, placed: list[_Rank], needed: Needed) -> int | None:
    """The column after which the next event comes, 0 for none; None where something before it has no place yet."""
    kind, numbers, _ = rank.call.events[rank.next]
    if kind != "waited":
        return 0
    causes = [cause for number in numbers for cause in needed.get((rank.row.rank, number), [])]
    columns = [placed[other].sent.get(number) for other, number in causes]
    return None if None in columns else max((column + 1 for column in columns if column is not None), default=0)


def _place(rank: _Rank, after: int) -> None:
    kind, numbers, words = rank.call.events[rank.next]
    rank.next += 1
    row = rank.row
    if kind == "phase":
        row.phases.append((rank.column, words))
        return
    if kind == "wait":  # no event of its own: it begins where the last one ends
        rank.waits_from = rank.column
        return
    column = max(rank.column, after)
    if kind == "work":
        row.work[column] = words
    for number in numbers:
        if kind == "sent":
            rank.sent[number] = column
        else:
            row.bars.append(Flight(rank.call.messages[number], rank.sent[number], column))
    if kind == "waited":
        row.waits.append((column if rank.waits_from is None else rank.waits_from, column))
        rank.waits_from = None
    rank.column = column + 1


def _finish(rank: _Rank, columns: int) -> None:
    """What never came to an end goes on to the picture's; which bars are exposed."""
    row, call = rank.row, rank.call
    if rank.waits_from is not None:
        row.waits.append((rank.waits_from, columns - 1))
    for number, message in enumerate(call.messages):
        if not message.waited:
            first = rank.sent[number]
            row.bars.append(Flight(message, first, first if message.inside else columns - 1))
    late = {id(call.messages[number]) for number in exposed(call)}
    for bar in row.bars:
        bar.exposed = id(bar.message) in late
    row.bars.sort(key=lambda bar: (bar.first, bar.last))


def lanes(row: Row) -> list[list[Flight]]:
    """Bars of which no two are there at once, lane by lane."""
    found: list[list[Flight]] = []
    for bar in row.bars:
        free = next((lane for lane in found if lane[-1].last < bar.first), None)
        if free is None:
            found.append(free := [])
        free.append(bar)
    return found


def squeezed(moments: Moments, most: int = 2) -> Moments:
    """With so many columns at most for a stretch in which no message begins or ends on any rank."""
    kept = {0, moments.columns - 1}
    for row in moments.rows:
        kept.update(column for bar in row.bars for column in (bar.first, bar.last))
        kept.update(first for first, _ in row.waits)
        kept.update(column for column, _ in row.phases)
    place, now, run = list[int](), -1, 0
    for column in range(moments.columns + 1):
        run = 0 if column in kept else run + 1
        now += run <= most
        place.append(now)
    rows = [
        Row(
            row.rank,
            [Flight(bar.message, place[bar.first], place[bar.last], bar.exposed) for bar in row.bars],
            {place[column]: what for column, what in row.work.items()},
            [(place[first], place[last]) for first, last in row.waits],
            [(place[column], what) for column, what in row.phases],
            row.ended,
        )
        for row in moments.rows
    ]
    return Moments(rows, place[moments.columns - 1] + 1 if moments.columns else 0)
