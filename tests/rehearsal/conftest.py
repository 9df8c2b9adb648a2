"""The process with the fake GPUs, shared by the tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.fake_cuda.process import FakeCUDAProcess


@pytest.fixture(scope="session")
def gpus() -> Iterator[FakeCUDAProcess]:
    process = FakeCUDAProcess()
    yield process
    process.close()
