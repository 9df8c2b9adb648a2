"""Fixtures for all tests, and their order: fast ones first, then those that start ranks, slow ones last."""

import os
import sys
from collections.abc import Iterator

# Before torch is imported, here and in every process that a test starts. One is the quickest: several ranks share two
# cores; SHARDRUN_TEST_THREADS is for a check that results do not hang on the number (tests/README.md).
os.environ["OMP_NUM_THREADS"] = os.environ.get("SHARDRUN_TEST_THREADS", "1")

# What a verb prints is as wide in every test, whoever runs it (a worker of pytest-xdist has 80 columns); those in a
# pseudo-terminal take its size.
os.environ["COLUMNS"] = "100"
os.environ.pop("LINES", None)

import pytest
import torch

from tests.ranks import RankPool
from tests.warm import Warm

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def weight(item: pytest.Item) -> int:
        return 2 * (item.get_closest_marker("slow") is not None) + (item.get_closest_marker("ranks") is not None)

    items.sort(key=weight)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """A test leaves the environment as it found it: a run within the process says there that it is on the CPU."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def warm_python() -> Iterator[str]:
    """A `python`, with an `accelerate` beside it, that has its libraries imported already (tests/warm.py; Linux)."""
    if sys.platform != "linux":
        yield sys.executable
        return
    warm = Warm()
    yield str(warm.python)
    warm.close()
