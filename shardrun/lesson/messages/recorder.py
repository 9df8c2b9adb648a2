"""What a rank sends and waits for, written down as it happens: also of a rank that never comes back something is left.

An event is a line of JSON in the rank's file, in their order:

    {"call": "chunk = float32 [7]", "ranks": 3}      the learner's function begins, or a step of a capstone
    {"sent": 0, "collective": "send", "bytes": 28, "group": "0", "inside": false, "peer": 1}
    {"wait": [0]}, {"waited": [0]}                   work.wait() is called, and returns
    {"phase": "backward"}                            what the trainer calls of a capstone
    {"work": "gradient of embed.weight"}             something that its model computes
    {"done": true}                                   the call ends; without this line it raised, or never came back
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from strategies import strict_json
from strategies.ledger.wire import Meter

SENDING = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "allgather_coalesced", "_allgather_base",
    "allgather_into_tensor_coalesced", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced",
    "alltoall", "alltoall_base", "gather", "scatter", "send", "recv", "recv_anysource", "barrier", "monitored_barrier",
)  # fmt: skip
"""Methods of a process group that start a message. One that is started from C++ is seen too, but not its waiting."""
WITH_PEER = ("send", "recv")
WAITING = ("wait", "synchronize", "get_future")


class MessageRecorder:
    """While it is open, what happens in its calls is noted: with recorder.call("the arguments, in words"): …"""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  open as long as the process lives
        self._meter = Meter()
        self._on, self._taken, self._number = False, 0, 0
        self._works: dict[int, tuple[Work, list[int]]] = {}
        """Of what has not been waited for: a work's id → the work itself, so that its id stays its, and messages."""
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "MessageRecorder":
        self._meter.__enter__()
        for name in SENDING:
            self._replace(ProcessGroup, name, self._sending)
        for name in WAITING:
            self._replace(Work, name, self._waiting)
        return self

    def __exit__(self, *error: object) -> None:
        for kind, name, method in reversed(self._before):
            setattr(kind, name, method)
        self._meter.__exit__()
        self._file.close()

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """What happens in here is the learner's; what: its arguments, in words."""
        self.begin(what)
        try:
            yield
            self.end()
        finally:
            self._on = False

    def begin(self, what: str) -> None:
        """A call or a step begins."""
        self._on, self._taken = True, len(self._meter.sent)
        self._works.clear()
        self._note(call=re.sub(r" at 0x[0-9a-fA-F]+", "", what), ranks=dist.get_world_size())

    def end(self) -> None:
        """It has come to its end."""
        if self._on:
            self._take()
            self._note(done=True)
        self._on = False

    def tell(self, **event: str) -> None:
        """Note something that is computed, or a phase."""
        if self._on:
            self._take()
            self._note(**event)

    def _note(self, **event: Any) -> None:
        self._file.write(strict_json.dumps(event) + "\n")
        self._file.flush()  # the process may be killed while it waits

    def _take(self, inside: bool = True, peer: int | None = None, received: int = 0) -> list[int]:
        """Note what the meter has seen since; the messages' numbers. inside: torch has sent it, from C++."""
        numbers = []
        for sent in self._meter.sent[self._taken :]:
            self._note(
                sent=self._number,
                collective=sent.collective,
                bytes=received or sent.payload_bytes,
                group=sent.group,
                inside=inside,
                **({"peer": peer} if peer is not None else {}),
            )
            numbers.append(self._number)
            self._number += 1
        self._taken = len(self._meter.sent)
        return numbers

    def _replace(self, kind: Any, name: str, wrapped: Callable[[str, Any], Any]) -> None:
        if (method := vars(kind).get(name)) is not None:  # not every torch has all of them
            self._before.append((kind, name, method))
            setattr(kind, name, wrapped(name, method))

    def _sending(self, name: str, method: Any) -> Any:
        def start(group: Any, *arguments: Any, **options: Any) -> Any:
            if not self._on:
                return method(group, *arguments, **options)
            self._take()
            work = method(group, *arguments, **options)
            peer = arguments[1] if name in WITH_PEER and len(arguments) > 1 else None
            received = sum(part.nbytes for part in arguments[0]) if name.startswith("recv") else 0
            numbers = self._take(False, peer, received)
            if work is not None:
                self._works[id(work)] = work, numbers
            return work

        return start

    def _waiting(self, name: str, method: Any) -> Any:
        def wait(work: Any, *arguments: Any, **options: Any) -> Any:
            _, numbers = self._works.pop(id(work), (None, []))
            if not self._on or not numbers:
                return method(work, *arguments, **options)
            self._take()
            self._note(wait=numbers)
            found = method(work, *arguments, **options)
            self._note(waited=numbers)
            return found

        return wait
