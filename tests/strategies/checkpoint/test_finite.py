"""A state with a NaN or an infinity is never written, and one that is there is recognised, whoever saved it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from strategies.checkpoint.finite import all_finite, newest_finite, not_finite, tensor_in_words
from strategies.checkpoint.folder import checkpoints
from strategies.checkpoint.format import INDEX, read_index, unseen
from strategies.checkpoint.load import load
from strategies.checkpoint.save import Saver
from tests.ranks import RankPool
from tests.strategies.checkpoint.damage import edit_index, reseal, spoil
from tests.strategies.checkpoint.runs import start, train, train_and_save

NAN, INF = float("nan"), float("inf")


def test_huge_values_are_finite_and_one_bad_one_is_found_anywhere() -> None:
    big = torch.full((2**22 + 5,), 3e38)  # whose sum is not finite
    assert all_finite(big) and all_finite(-big) and all_finite(torch.empty(0)) and all_finite(torch.zeros(3).byte())
    for at in (0, 2**22 - 1, 2**22, 2**22 + 4):
        for value in (NAN, INF, -INF):
            for background in (big, torch.zeros(2**22 + 5)):
                spoilt = background.clone()
                spoilt[at] = value
                assert not all_finite(spoilt)
    both = torch.tensor([INF, -INF])
    assert not all_finite(both)
    assert tensor_in_words("weight/a.b") == "the weight a.b" and tensor_in_words("exp_avg/a.b") == "the exp_avg of a.b"


def save_spoilt(name: str, folder: Path, kind: str) -> tuple[str | None, str | None]:
    """On a rank: a good save, then one of a state that holds a NaN on the last rank that holds it; what rank 0 says."""
    strategy = start(name)
    train(strategy, 0, 1)
    saver = Saver(folder, name, "fp32", strategy.optimizer, keep=1)
    saver.save(1, {})
    saver.wait()
    assert saver.failure is None and saver.not_finite is None
    optimizer, place = strategy.optimizer, strategy.optimizer.place
    held = [piece for piece in optimizer.all_slices() if piece.name == "embed.weight"]
    (piece,) = held
    last = max(rank for rank in range(place.ranks) if piece.state[rank].numel)
    if place.rank == last or piece.replicated:
        with torch.no_grad():
            (optimizer.weight(piece) if kind == "weight" else optimizer.state_of(piece, kind))[-1] = NAN
    saver.save(2, {})
    saver.wait()
    if place.ranks > 1:
        torch.distributed.barrier()
    return saver.failure, saver.not_finite


@pytest.mark.ranks
@pytest.mark.parametrize("name", ("single", "ddp", "fsdp", "zero2", "zero3"))
def test_a_value_of_any_rank_keeps_all_from_saving_and_nothing_older_goes(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    kinds = {"weight": "the weight embed.weight", "exp_avg_sq": "the exp_avg_sq of embed.weight"}
    for kind, words in kinds.items():
        failure, which = ranks.run(1 if name == "single" else 2, save_spoilt, name, tmp_path / kind, kind)[0]
        assert failure == f"the checkpoint of step 2 was not saved: {words} is not finite"
        assert which == f"{words} is not finite after step 2"
        assert list(checkpoints(tmp_path / kind)) == [1]  # keep is 1
        assert not [path for path in (tmp_path / kind).iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    train_and_save("single", folder)
    return next(iter(checkpoints(folder).values()))


def test_what_is_written_is_known_to_be_finite_without_reading_it(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_index(good)
    assert index.finite == {
        file: hashlib.sha256((good / file).read_bytes()).hexdigest() for file in index.files
    } and not unseen(good, index)
    monkeypatch.setattr("strategies.checkpoint.finite.Shards.read", None)
    assert not_finite(good, index) is None


@pytest.mark.parametrize("seen", (False, True))
@pytest.mark.parametrize("value", (NAN, -INF))
@pytest.mark.parametrize("name", ("weight/embed.weight", "exp_avg/embed.weight"))
def test_one_that_is_there_is_recognised_and_refused(
    good: Path, tmp_path: Path, name: str, value: float, seen: bool
) -> None:
    """seen: its files were changed after they had been found finite."""
    bad = Path(shutil.copytree(good, tmp_path / "step_00000009"))
    spoil(bad, name, value, seen)
    index = read_index(bad)
    assert unseen(bad, index) == set(index.files)
    assert not_finite(bad, index) == f"{tensor_in_words(name)} is not finite"
    assert not_finite(bad, index, kind="weight/") == (
        f"{tensor_in_words(name)} is not finite" if "weight/" in name else None
    )
    with pytest.raises(ValueError, match=f"cannot be gone on from: {tensor_in_words(name)} is not finite; use another"):
        load(bad, index, start("single", seed=1))
    assert newest_finite([bad, good]) == (good, [f"{bad} is passed over: {tensor_in_words(name)} is not finite"])
    assert newest_finite([bad])[0] is None


def test_one_of_an_older_version_is_as_good_as_its_values(good: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(good, tmp_path / good.name))
    edit_index(old, lambda content: content.pop("finite"))
    index = read_index(old)
    assert index.finite == {} and unseen(old, index) and not_finite(old, index) is None
    load(old, index, start("single", seed=1))
    content = json.loads((old / INDEX).read_text())
    for wrong in ([1], {"rank_000.safetensors": 1}):
        (old / INDEX).write_text(json.dumps({**content, "finite": wrong}))
        reseal(old)
        with pytest.raises(ValueError, match="'finite' holds something else than a hash per file"):
            read_index(old)
