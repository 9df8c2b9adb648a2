"""How a result came about: calls, messages, bytes, the largest tensor, what autograd keeps, what is read of a file.

The bytes that a rank sends are counted by strategies.ledger.wire.Meter; `sent_bytes` and `on_all_wires` sum them.
"""

import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardrun.lesson.arguments import tensors
from shardrun.lesson.wrong import Wrong


class Counted:
    """A function that counts how often it is called, and keeps the arguments of each call (copies of tensors)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        self.given.append(tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in arguments))
        return self.function(*arguments, **keywords)


class Largest(TorchDispatchMode):
    """The largest new tensor, and the most new bytes alive at once, of everything torch computes inside.

    with Largest() as memory: …, then memory.elements (of the largest), memory.live_bytes (the most at once) and
    memory.alive (bytes now). A view of something older is nothing new.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.live_bytes = self.alive = 0
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: set[torch.dtype] = set()
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        older = {part.untyped_storage().data_ptr() for part in tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors(result):
            self.dtypes.add(tensor.dtype)
            storage = tensor.untyped_storage()
            if storage.data_ptr() in older or storage.data_ptr() in self._storages:
                continue
            self._storages[storage.data_ptr()] = storage.nbytes()
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._gone, storage.data_ptr())
            self.elements = max(self.elements, storage.nbytes() // max(1, tensor.element_size()))
            self.live_bytes = max(self.live_bytes, self.alive)
            self.shapes.append(tuple(tensor.shape))
        return result

    def _gone(self, address: int) -> None:
        self.alive -= self._storages.pop(address, 0)


def kept(run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What `run` returns, and the tensors that autograd keeps of it for backward."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return result, saved


def read_bytes(run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` returns, and how many bytes it reads of files or takes as memory, whichever is more.

    Bytes read are counted on Linux alone; what is copied into memory everywhere.
    """
    process = psutil.Process()
    count = (lambda: process.io_counters().read_chars) if sys.platform == "linux" else (lambda: 0)
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    try:
        count()
        overhead = count()
        overhead = count() - overhead  # of counting itself
        before = count()
        tracemalloc.reset_peak()
        base = tracemalloc.get_traced_memory()[0]
        result = run()
        taken = tracemalloc.get_traced_memory()[1] - base
        return result, max(count() - before - overhead, taken)
    finally:
        if not tracing:
            tracemalloc.stop()


def sent_bytes(meter: Any, *collectives: str) -> int:
    """Payload bytes that a Meter has seen this rank send, by these collectives or by all."""
    return sum(sent.payload_bytes for sent in meter.sent if not collectives or sent.collective in collectives)


def on_all_wires(meter: Any) -> float:
    """Bytes that all ranks together have put on their wires, as a Meter saw them and a ring carries them out.

    Every rank calls it, after the Meter is closed. So it does not matter which rank sends, only how much is sent.
    """
    own = torch.tensor([sum(line.ring_bytes for line in meter.lines())], dtype=torch.float64)
    dist.all_reduce(own)
    return own.item()


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """What torch.empty returns is full of nan in here: who reads what nobody has written is not lucky."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


class Requests:
    """Sends and receives of this process: who started one has to wait for it, and receives into the right dtype.

    with Requests() as requests: …, then requests.expect_waited(). dtype: of what is sent around, where it is known: who
    receives into another one gets Wrong at once, for gloo would end the process.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.started: list[tuple[str, dist.Work]] = []
        self.waited: set[int] = set()
        self._before: list[tuple[type, str, Any]] = []

    def __enter__(self) -> "Requests":
        for name in ("send", "recv", "recv_anysource"):
            self._replace(dist.ProcessGroup, name, self._noting)
        for name in ("wait", "is_completed", "get_future", "synchronize"):
            self._replace(dist.Work, name, self._waiting)
        return self

    def __exit__(self, *error: object) -> None:
        for kind, name, method in reversed(self._before):
            setattr(kind, name, method)

    def expect_waited(self) -> None:
        """Raises Wrong where one was started that nobody has waited for."""
        left = {name for name, work in self.started if id(work) not in self.waited}
        if any(name.startswith("recv") for name in left):
            raise Wrong(
                "You never wait for what irecv has started: until request.wait() returns, the tensor holds whatever "
                "was in its memory before."
            )
        if left:
            raise Wrong(
                "You never wait for what isend has started: until request.wait() returns, the tensor may not have been "
                "sent, and nobody may write into it."
            )

    def _replace(self, kind: Any, name: str, wrapped: Callable[[str, Any], Any]) -> None:
        method = vars(kind)[name]
        self._before.append((kind, name, method))
        setattr(kind, name, wrapped(name, method))

    def _noting(self, name: str, method: Any) -> Any:
        def start(group: Any, tensors: list[Tensor], *rest: Any, **more: Any) -> Any:
            if name != "send" and self.dtype and tensors[0].dtype != self.dtype:
                got, due = (str(each).removeprefix("torch.") for each in (tensors[0].dtype, self.dtype))
                raise Wrong(f"You receive into a tensor of {got}; what is sent is {due}. Make it by torch.empty_like.")
            work = method(group, tensors, *rest, **more)
            self.started.append((name, work))
            return work

        return start

    def _waiting(self, name: str, method: Any) -> Any:
        def wait(work: Any, *arguments: Any, **keywords: Any) -> Any:
            found = method(work, *arguments, **keywords)
            if name != "is_completed" or found:
                self.waited.add(id(work))
            return found

        return wait
