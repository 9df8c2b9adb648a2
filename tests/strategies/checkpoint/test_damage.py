"""A damaged checkpoint is refused by name before anything has changed; nothing in a folder is ever executed."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from strategies.base import Strategy
from strategies.checkpoint.format import INDEX, SUMS, read_index, shard_name
from strategies.checkpoint.load import check_weights, load
from strategies.checkpoint.save import Saver
from strategies.checkpoint.shards import Shards, write_shard
from tests.ranks import RankPool
from tests.strategies.checkpoint.damage import edit_index, flip, reseal
from tests.strategies.checkpoint.runs import CASE, SAVED, start, train, train_and_save
from tests.strategies.small import shapes_of

SHARD = shard_name(0)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    train_and_save("single", folder)
    return folder / f"step_{SAVED:08d}"


@pytest.fixture
def checkpoint(intact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(intact, tmp_path / intact.name))


@pytest.fixture(scope="module")
def other() -> Strategy:
    """Another run of the same model."""
    strategy = start("single", seed=1)
    train(strategy, 0, 1)
    return strategy


def refused(checkpoint: Path, strategy: Strategy) -> str:
    """The sentence; fails where there is none, or where something has changed nevertheless."""
    before = strategy.optimizer.full_weights()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(checkpoint, read_index(checkpoint), strategy)
    assert all(torch.equal(weight, before[name]) for name, weight in strategy.optimizer.full_weights().items())
    assert str(error.value).count("\n") == 0
    return str(error.value)


def test_the_intact_one_loads_and_is_plain_safetensors(intact: Path, other: Strategy) -> None:
    index = read_index(intact)
    load(intact, index, start("single", seed=1))
    file = load_file(intact / SHARD)
    assert set(file) == set(index.tensors)
    shapes = shapes_of(CASE)
    assert {name for name in file if name.startswith("weight/")} == {f"weight/{name}" for name in shapes}
    assert file["weight/embed.weight"].numel() == 257 * 48 and file["step/embed.weight"].item() == SAVED


@pytest.mark.parametrize("file", (SHARD, INDEX, SUMS))
@pytest.mark.parametrize("place", (0, 1, 9, 100, 0.5, -1))
@pytest.mark.parametrize("bit", (0, 5))
def test_a_flipped_bit_in_any_file_is_refused(
    checkpoint: Path, other: Strategy, file: str, place: float, bit: int
) -> None:
    size = (checkpoint / file).stat().st_size
    flip(checkpoint / file, int(place * size) if place == 0.5 else int(place), bit)
    message = refused(checkpoint, other)
    assert str(checkpoint) in message and "damaged" in message or "missing" in message
    if file != SUMS:  # a damaged list of hashes accuses the file whose hash it has lost
        assert file in message


@pytest.mark.parametrize("file", (SHARD, INDEX, SUMS))
def test_a_missing_file_is_refused(checkpoint: Path, other: Strategy, file: str) -> None:
    (checkpoint / file).unlink()
    message = refused(checkpoint, other)
    assert file in message and "missing" in message and str(checkpoint) in message


@pytest.mark.parametrize("file", (SHARD, INDEX, SUMS))
@pytest.mark.parametrize("share", (0.0, 0.4, 0.999))
def test_a_truncated_file_is_refused(checkpoint: Path, other: Strategy, file: str, share: float) -> None:
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes(content[: int(share * len(content))])
    message = refused(checkpoint, other)
    assert file in message or SUMS in message


def test_a_format_from_the_future_is_refused(checkpoint: Path, other: Strategy) -> None:
    edit_index(checkpoint, lambda content: content.update(version=2))
    assert "format version 2, and this shardrun reads version 1: update shardrun" in refused(checkpoint, other)


def test_another_models_shapes_are_refused(checkpoint: Path, other: Strategy) -> None:
    index = read_index(checkpoint)
    shapes = shapes_of(CASE)
    with pytest.raises(ValueError, match=r"another model: its embed.weight has shape \[257, 48\], here it has \[9, 48"):
        check_weights(checkpoint, index, {**shapes, "embed.weight": (9, 48)})
    with pytest.raises(ValueError, match="it has no extra.weight"):
        check_weights(checkpoint, index, {**shapes, "extra.weight": (1,)})
    with pytest.raises(ValueError, match="it has embed.weight, which this one has not"):
        check_weights(checkpoint, index, {name: shape for name, shape in shapes.items() if name != "embed.weight"})


def rename(content: dict[str, Any], name: str, other_name: str) -> None:
    content["tensors"][other_name] = content["tensors"].pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: rename(c, "exp_avg/embed.weight", "momentum_buffer/embed.weight"), "of another optimizer"),
        (lambda c: c["tensors"]["weight/embed.weight"].update(shape=[48, 257]), "embed.weight has shape [48, 257]"),
        (lambda c: c["tensors"].pop("step/embed.weight"), "does not hold step/embed.weight"),
        (lambda c: c["tensors"]["exp_avg/embed.weight"].update(shape=[48, 257]), "exp_avg/embed.weight is float32 [48"),
    ],
)
def test_an_index_that_tells_of_other_tensors_is_refused(
    checkpoint: Path, other: Strategy, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    edit_index(checkpoint, change)
    assert words in refused(checkpoint, other)


def test_a_shard_that_is_not_what_the_index_says_is_refused(checkpoint: Path, other: Strategy) -> None:
    """Behind intact hashes: another tensor's numbers under a name, and a file that is no safetensors at all."""
    tensors = {name: tensor.clone() for name, tensor in load_file(checkpoint / SHARD).items()}  # not the mapped file
    original = (checkpoint / SHARD).read_bytes()
    tensors["weight/embed.weight"] = tensors["weight/embed.weight"][:-1]
    written = write_shard(checkpoint / SHARD, tensors)
    edit_index(checkpoint, lambda content: content["files"].update({SHARD: written.size}))
    assert "embed.weight" in (message := refused(checkpoint, other)) and SHARD in message
    (checkpoint / SHARD).write_bytes(b"\xff" * len(original))
    edit_index(checkpoint, lambda content: content["files"].update({SHARD: len(original)}))
    assert "cannot be read as safetensors" in refused(checkpoint, other)


class Bomb:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_malicious_pickle_is_not_executed(checkpoint: Path, other: Strategy, tmp_path: Path) -> None:
    """As a stranger beside the files, in place of one, and in place of one with every hash and size made to match."""
    exploded = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(exploded))
    for name in ("model.pt", "rank_001.safetensors", "pickle.pkl", "rank_000.json"):
        (checkpoint / name).write_bytes(bomb)
    load(checkpoint, read_index(checkpoint), start("single", seed=1))
    for file in (SHARD, INDEX, SUMS):
        before = (checkpoint / file).read_bytes()
        (checkpoint / file).write_bytes(bomb)
        refused(checkpoint, other)
        (checkpoint / file).write_bytes(before)
    (checkpoint / SHARD).write_bytes(bomb)
    reseal(checkpoint)
    edit_index(checkpoint, lambda content: content["files"].update({SHARD: len(bomb)}))
    refused(checkpoint, other)
    edit_index(checkpoint, lambda content: content.update(tensors={}))  # nothing that could need more bytes
    refused(checkpoint, other)
    assert not exploded.exists()
    pickle.loads(bomb)
    assert exploded.exists()  # it was a live one


def refused_on_a_rank(name: str, checkpoint: Path) -> str:
    return refused(checkpoint, start(name, seed=1))


@pytest.mark.ranks
@pytest.mark.parametrize("name", ("ddp", "zero2"))
def test_what_one_rank_finds_all_ranks_refuse(ranks: RankPool, checkpoint: Path, name: str) -> None:
    """One file, which rank 0 hashes and rank 1 does not."""
    flip(checkpoint / SHARD, 5000)
    messages = ranks.run(2, refused_on_a_rank, name, checkpoint)
    assert messages[0] == messages[1] and SHARD in messages[0]


def test_what_is_saved_before_the_first_update_begins_as_a_new_run_does(tmp_path: Path) -> None:
    """In fp16 all steps up to a save may have been left out: the states are then zeros."""
    strategy, other = start("single"), start("single", seed=1)
    saver = Saver(tmp_path, "single", "fp32", strategy.optimizer)
    saver.save(0, {})
    saver.wait()
    (checkpoint,) = (path for path in tmp_path.iterdir() if path.is_dir())
    load(checkpoint, read_index(checkpoint), other)
    states = other.optimizer.full_state()
    assert states and not any(tensor.any() for buffers in states.values() for tensor in buffers.values())
    for name, weight in strategy.optimizer.full_weights().items():
        assert torch.equal(weight, other.optimizer.full_weights()[name])


def test_shards_read_any_part_of_any_tensor(tmp_path: Path) -> None:
    """Against slicing the whole tensor, cut into three files at odd places."""
    from strategies.checkpoint.format import Piece, Stored
    from strategies.layout import Interval

    whole = torch.arange(35, dtype=torch.float32)
    cuts = [0, 11, 12, 35]
    for rank in range(3):
        write_shard(tmp_path / shard_name(rank), {"t": whole[cuts[rank] : cuts[rank + 1]].clone()})
    pieces = tuple(Piece(shard_name(rank), cuts[rank], cuts[rank + 1]) for rank in range(3))
    tensor = Stored((5, 7), "float32", pieces)
    with Shards(tmp_path) as shards:
        for begin in range(36):
            for end in range(begin, 36):
                out = torch.full((end - begin,), -1.0)
                shards.read("t", tensor, Interval(begin, end), out)
                assert torch.equal(out, whole[begin:end])
        assert torch.equal(shards.whole("t", tensor), whole.view(5, 7))
