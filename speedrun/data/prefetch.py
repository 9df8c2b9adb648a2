"""Prepare the next items in a background thread while the present one is used."""

import queue
import threading
import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

from strategies.errors import UserError

T = TypeVar("T")


class Prefetch(Iterator[T], Generic[T]):
    """An iterator over `items` whose next `depth` items are already being made. Made by `prefetch`.

    The thread holds the two queues and the flag but not this object. So an abandoned iterator is collected, which ends
    its thread, instead of being kept alive by it.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        if depth < 1:
            raise UserError(f"Prefetching needs a depth of at least 1, not {depth}.")
        self._results: queue.SimpleQueue[tuple[T] | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(items, self._results, self._room, self._ended), name="prefetch", daemon=True
        )
        self._end = weakref.finalize(self, _end, self._room, self._ended)
        self._thread.start()

    def __next__(self) -> T:
        """The next item; an exception of the thread is raised here, after the items that were made before it."""
        if self._ended.is_set():
            raise StopIteration
        result = self._results.get()
        if isinstance(result, BaseException):  # StopIteration too: the items are at their end
            self._ended.set()
            raise result
        self._room.release()
        return result[0]

    def close(self) -> None:
        """End the thread (after the item that it is making) and drop what it has made. May be called twice."""
        self._end()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prefetch(items: Iterable[T], depth: int = 2) -> Prefetch[T]:
    """Iterate over `items` in a background thread, at most `depth` items ahead of the consumer.

    with prefetch((data.batch(step, first, last) for step in range(steps)), depth=2) as batches:
        for inputs, targets in batches: ...
    """
    return Prefetch(items, depth)


def _produce(
    items: Iterable[T],
    results: "queue.SimpleQueue[tuple[T] | BaseException]",
    room: threading.Semaphore,
    ended: threading.Event,
) -> None:
    try:
        iterator = iter(items)
        while True:
            room.acquire()
            if ended.is_set():
                return
            results.put((next(iterator),))
    except BaseException as error:
        results.put(error)


def _end(room: threading.Semaphore, ended: threading.Event) -> None:
    ended.set()
    room.release()
