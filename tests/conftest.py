"""Fixtures for all tests, and their order: fast ones first, then those that start ranks, slow ones last."""

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in every process that a test starts

import pytest
import torch

from tests.ranks import RankPool

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def weight(item: pytest.Item) -> int:
        return 2 * (item.get_closest_marker("slow") is not None) + (item.get_closest_marker("ranks") is not None)

    items.sort(key=weight)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()
