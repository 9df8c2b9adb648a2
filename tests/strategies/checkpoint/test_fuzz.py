"""Whatever bytes an index, a list of hashes or a shard has: a checkpoint, or a sentence; nothing else, and no hang."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strategies.checkpoint.format import SUMS, Index, Piece, Stored, index_json, parse_index, read_sums, shard_name
from strategies.checkpoint.shards import Shards, write_shard

PATH = Path("checkpoints/step_00000010/index.json")
SHAPE = (5, 7)
GOOD = json.loads(
    index_json(
        Index(
            10,
            {"strategy": "ddp", "world_size": 2},
            {"config": {"seed": 1}},
            {shard_name(0): 1000, shard_name(1): 1000},
            {
                "weight/a": Stored(SHAPE, "float32", (Piece(shard_name(0), 0, 20), Piece(shard_name(1), 20, 35))),
                "step/a": Stored((), "float32", (Piece(shard_name(0), 0, 1),)),
                "generator.cpu/rank_000": Stored((16,), "uint8", (Piece(shard_name(0), 0, 16),)),
            },
            {"scale": 65536.0, "clean_steps": 7, "hysteresis": 2},
        )
    )
)

NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 20, 35, 36, 2**31, 2**62, 2**63, 2**64, 10**400]),
    st.floats(),
    st.integers(),
)
LETTERS = "ab/.\\\0é\U0001f600{"  # spelled out: Hypothesis takes long to prepare all of Unicode
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(LETTERS, max_size=20)
    | st.sampled_from([shard_name(0), "../../etc/passwd"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(LETTERS, max_size=10), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    found = [at]
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*at, key))
    return found


def promises(index: Index) -> None:
    """What format.py says of every index that it returns, checked by counting each element."""
    sizes = dict.fromkeys(index.files, 0)
    for tensor in index.tensors.values():
        count = 1
        for side in tensor.shape:
            count *= side
        assert count < 10_000, "more than its files hold"
        seen = [0] * count
        for file, start, stop in tensor.pieces:
            for element in range(start, stop):
                seen[element] += 1
            sizes[file] += (stop - start) * {"float32": 4, "uint8": 1}[tensor.dtype]
        assert seen == [1] * count
    assert all(sizes[file] <= size for file, size in index.files.items())
    assert all("/" not in file and ".." not in file for file in index.files)


def parse(written: bytes) -> Index | None:
    try:
        index = parse_index(written, PATH)
    except ValueError as error:
        assert str(error).startswith(str(PATH)) and "\n" not in str(error) and len(str(error)) < 400
        return None
    return index


def test_the_good_one_parses() -> None:
    index = parse(json.dumps(GOOD).encode())
    assert index and index.tensors["weight/a"].shape == SHAPE
    promises(index)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_an_index_with_anything_anywhere(data: st.DataObject) -> None:
    content = copy.deepcopy(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from([place for place in places(content) if place]))
        inside = content
        for key in way:
            inside = inside[key]
        if data.draw(st.booleans()):
            inside[last] = data.draw(ANYTHING)
        elif isinstance(inside, dict) and data.draw(st.booleans()):
            inside[data.draw(st.text(LETTERS, max_size=10))] = inside.pop(last)
        else:
            del inside[last]
    index = parse(json.dumps(content).encode())
    if index and max(index.files.values(), default=0) < 10_000:
        promises(index)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2000), st.integers(0, 200))
def test_an_index_with_bytes_cut_out_or_put_in(inserted: bytes, at: int, removed: int) -> None:
    good = json.dumps(GOOD).encode()
    index = parse(good[:at] + inserted + good[at + removed :])
    if index:
        promises(index)
    parse(inserted)


@pytest.mark.parametrize(
    "written",
    [
        b"",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"9" * 10_000,
        b'{"format": NaN}',
        b"\xff\xfe",
        b"null",
        b'"' + b"\\u0000",
    ],
)
def test_an_index_that_is_meant_to_break_a_reader(written: bytes) -> None:
    assert parse(written) is None


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=300), st.text(alphabet="abcdef0123456789 \n.", max_size=300).map(str.encode)))
def test_any_list_of_hashes(tmp_path: Path, written: bytes) -> None:
    (tmp_path / SUMS).write_bytes(written)
    try:
        hashes = read_sums(tmp_path)
    except ValueError as error:
        assert str(tmp_path / SUMS) in str(error)
    else:
        assert all(len(digest) == 64 and "/" not in name for name, digest in hashes.items())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 500), st.integers(0, 60), st.booleans())
def test_any_shard(tmp_path: Path, inserted: bytes, at: int, removed: int, same_length: bool) -> None:
    """Read without its hash being looked at: the tensor, or a sentence that names the file."""
    good = tmp_path / "good.safetensors"
    if not good.exists():
        write_shard(good, {"t": torch.arange(35.0), "generator": torch.zeros(16, dtype=torch.uint8)})
    content = good.read_bytes()
    removed = len(inserted) if same_length else removed
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / shard_name(0)).write_bytes(content[:at] + inserted + content[at + removed :])
    with Shards(folder) as shards:
        try:
            tensor = shards.whole("t", Stored(SHAPE, "float32", (Piece(shard_name(0), 0, 35),)))
        except ValueError as error:
            assert shard_name(0) in str(error)
        else:
            assert tensor.shape == SHAPE and tensor.dtype == torch.float32


def test_a_header_that_asks_for_the_worlds_memory(tmp_path: Path) -> None:
    for length in (2**62, 2**31, 50_000_000):
        (tmp_path / shard_name(0)).write_bytes(length.to_bytes(8, "little") + b"{}")
        with Shards(tmp_path) as shards, pytest.raises(ValueError, match="cannot be read as safetensors"):
            shards.whole("t", Stored((2**40,), "float32", (Piece(shard_name(0), 0, 2**40),)))
