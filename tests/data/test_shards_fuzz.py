"""A shard comes from anywhere: its tokens are mapped, or it is refused in a sentence that names it; nothing else."""

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speedrun.data.shards import HEADER_BYTES, MAGIC, VERSION, open_shard

FORMAT = {2: (MAGIC, VERSION), 4: (20240801, 7)}
INT32 = st.integers(-(2**31), 2**31 - 1)
quickly = settings(max_examples=200, deadline=None)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x_train_000001.bin"


def open_or_say(path: Path) -> None:
    """Refused by name, or exactly the tokens of the file, without taking memory for what a header promises."""
    tracemalloc.start()
    try:
        tokens = open_shard(path)
    except ValueError as error:
        assert str(path) in str(error) and len(str(error)) < 400
    else:
        content = path.read_bytes()
        assert content[:12] == struct.pack("<3i", *FORMAT[tokens.dtype.itemsize], len(tokens))
        assert tokens.tobytes() == content[HEADER_BYTES:] and len(tokens) >= 1
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10e6


@quickly
@given(
    st.one_of(st.just(MAGIC), st.just(20240801), INT32),
    st.one_of(st.just(VERSION), st.just(7), INT32),
    st.one_of(st.integers(-1, 20), INT32),
    st.integers(0, 45),
)
@example(MAGIC, VERSION, 20, 40)
@example(20240801, 7, 10, 40)
@example(MAGIC, VERSION, 2**31 - 1, 40)
@example(MAGIC, VERSION, 0, 0)
def test_any_header_over_any_length(path: Path, magic: int, version: int, count: int, body: int) -> None:
    header = struct.pack("<3i", magic, version, count)
    path.write_bytes(header + bytes(HEADER_BYTES - len(header)) + bytes(range(body)))
    open_or_say(path)


@quickly
@given(st.binary(max_size=HEADER_BYTES + 40))
def test_any_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    open_or_say(path)


def test_a_good_shard_opens_and_what_is_no_file_is_named(path: Path, tmp_path: Path) -> None:
    path.write_bytes(struct.pack("<3i", MAGIC, VERSION, 3) + bytes(HEADER_BYTES - 12) + struct.pack("<3H", 7, 8, 65535))
    assert open_shard(path).tolist() == [7, 8, 65535]
    (tmp_path / "link.bin").symlink_to(tmp_path / "nothing")
    for other in (tmp_path, tmp_path / "link.bin"):
        with pytest.raises(ValueError, match="is not a file"):
            open_shard(other)
