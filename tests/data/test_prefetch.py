"""Prefetching: the items in order, no further ahead than asked, errors in the consumer, and no thread left behind."""

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from speedrun.data import prefetch


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_items_in_order_from_another_thread() -> None:
    def items() -> Iterator[tuple[int, str]]:
        for i in range(20):
            yield i, threading.current_thread().name

    iterator = prefetch(items(), depth=3)
    assert list(iterator) == [(i, "prefetch") for i in range(20)]
    assert list(iterator) == []
    wait_until(lambda: threads() == 0)


def test_stays_depth_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    with prefetch(items(), depth=3) as iterator:
        wait_until(lambda: len(made) == 3)
        time.sleep(0.05)
        assert len(made) == 3
        next(iterator)
        wait_until(lambda: len(made) == 4)
        time.sleep(0.05)
        assert len(made) == 4


def test_an_error_reaches_the_consumer_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("shard x is broken")

    iterator = prefetch(items())
    assert next(iterator) == 1
    with pytest.raises(ValueError, match="shard x is broken"):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    wait_until(lambda: threads() == 0)


def test_close_ends_the_thread() -> None:
    iterator = prefetch(iter(range(100)))
    assert next(iterator) == 0
    iterator.close()
    assert threads() == 0
    iterator.close()
    with pytest.raises(StopIteration):
        next(iterator)


def test_an_abandoned_iterator_ends_its_thread() -> None:
    iterator = prefetch(iter(range(100)))
    next(iterator)
    assert threads() == 1
    del iterator
    gc.collect()
    wait_until(lambda: threads() == 0)


def test_depth() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        prefetch([1], depth=0)
