"""Generated cases: the smallest that fails is shown, in time, alike on all ranks, and without a trace on the disk."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st

from lessons.cases import generated
from lessons.meters import Counted, Largest, on_all_wires, read_bytes, unwritten_is_nan
from shardrun.lesson.wrong import Wrong
from strategies.ledger.wire import Meter
from tests.ranks import RankPool


def test_the_smallest_case_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def compare(rows: int, sizes: list[int]) -> None:
        if rows * sum(sizes) > 11:
            raise Wrong(f"{rows} rows of {sizes}")

    said = set()
    for _ in range(2):
        with pytest.raises(Wrong) as wrong:
            generated(compare, rows=st.integers(1, 50), sizes=st.lists(st.integers(0, 50)))
        said.add(str(wrong.value))
    assert said == {"1 rows of [12]"}
    assert not list(tmp_path.iterdir())


def test_an_error_is_made_smaller_too_and_what_is_not_begun_ends_it() -> None:
    with pytest.raises(ZeroDivisionError):
        generated(lambda n: 1 / (n - 7), n=st.integers(0, 40))


def test_what_is_kept_from_an_earlier_call_is_named() -> None:
    seen: list[int] = []

    def compare(n: int) -> None:
        seen.append(n)
        if n > 3 and len(seen) < 8:
            raise Wrong(f"n = {n}")

    with pytest.raises(Wrong, match="keep something from an earlier call"):
        generated(compare, n=st.integers(0, 100))


@pytest.mark.parametrize("clock", [time.process_time, time.monotonic], ids=["busy", "waiting"])
def test_it_ends_in_time(clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lessons.cases.WAITED", 0.5 if clock is time.monotonic else 1e9)

    def slow(n: int) -> None:
        until = clock() + 0.05
        while clock() < until:
            time.sleep(0.01) if clock is time.monotonic else None
        if n > 20:
            raise Wrong(f"n = {n}")

    started = clock()
    with pytest.raises(Wrong, match="n = "):
        generated(slow, most=1000, seconds=0.5, n=st.integers(0, 10**6))
    assert clock() - started < 5


def together() -> tuple[str, int]:
    """On every rank: only rank 1 sees what is wrong."""
    rank, tried = dist.get_rank(), 0

    def compare(n: int) -> None:
        nonlocal tried
        tried += 1
        dist.barrier()
        if n > 5 and rank == 1:
            raise Wrong(f"n = {n}")

    try:
        generated(compare, n=st.integers(0, 100))
    except Wrong as wrong:
        return str(wrong), tried
    return "", tried


@pytest.mark.ranks
def test_ranks_decide_together(ranks: RankPool) -> None:
    found = ranks.run(2, together)
    assert found[0] == found[1] and found[0][0] == "On rank 1: n = 6"


def test_counting(tmp_path: Path) -> None:
    twice = Counted(lambda x: 2 * x)
    x = torch.ones(2)
    twice(x)
    x.zero_()
    assert twice.calls == 1 and twice.given[0][0].tolist() == [1.0, 1.0]
    with Largest() as memory:
        for _ in range(3):
            part = torch.ones(100) * 2
            del part
    assert memory.elements == 100 and memory.live_bytes == 800
    path = tmp_path / "file"
    path.write_bytes(bytes(10**6))
    assert read_bytes(lambda: path.read_bytes()[:4])[1] >= 10**6
    assert read_bytes(lambda: path.open("rb").read(4))[1] < 20_000


def test_memory_that_nobody_has_written_is_nan_for_as_long_as_asked() -> None:
    with unwritten_is_nan():
        whole = torch.empty(3)
        assert whole.isnan().all() and torch.empty_like(whole.bfloat16()).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def sent_in_three_ways() -> list[float]:
    """Bytes on all wires of an all-reduce, a broadcast, and of all that is handed to rank 0."""
    tensor, found = torch.zeros(6), []
    room = [torch.empty(6) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    for run in (dist.all_reduce, lambda each: dist.broadcast(each, 0), lambda each: dist.gather(each, room)):
        with Meter() as meter:
            run(tensor)
        found.append(on_all_wires(meter))
    return found


@pytest.mark.ranks
def test_bytes_on_the_wires_of_all_ranks(ranks: RankPool) -> None:
    once = 2 * 24.0
    assert ranks.run(3, sent_in_three_ways) == [[2 * once, once, once]] * 3
