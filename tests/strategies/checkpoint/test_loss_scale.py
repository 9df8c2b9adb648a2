"""fp16's loss scale in a checkpoint: whoever saved it, whoever goes on; and checkpoints that have none."""

import json
from pathlib import Path
from typing import Any

import pytest

from strategies.checkpoint.folder import find_checkpoint
from strategies.checkpoint.format import index_json, parse_index, read_index
from strategies.checkpoint.load import load
from strategies.checkpoint.save import Saver
from tests.ranks import RankPool
from tests.strategies.checkpoint.runs import start, train, train_and_save

SAVERS = [("single", 1), ("fsdp", 3), ("zero2", 2), ("zero3", 2)]


def save(name: str, folder: Path) -> None:
    """On a rank: two steps and three overflows, then a step; saved."""
    strategy = start(name, "fp16")
    assert strategy.loss_scale
    train(strategy, 0, 2)
    for overflow in (True, True, True, False):
        strategy.loss_scale.update(overflow)
    saver = Saver(folder, name, "fp16", strategy.optimizer, loss_scale=strategy.loss_scale)
    saver.save(2, {"note": "a test"})
    strategy.loss_scale.update(True)  # while it is written
    saver.wait()
    assert saver.failure is None, saver.failure


def states(name: str, checkpoints: list[Path]) -> list[dict[str, Any]]:
    """On a rank: what the scale's state is after each of these was loaded, one after the other."""
    strategy, found = start(name, "fp16", seed=1), []
    assert strategy.loss_scale
    for checkpoint in checkpoints:
        load(checkpoint, read_index(checkpoint), strategy)
        found.append(strategy.loss_scale.state())
    train(strategy, 2, 3)
    return found


@pytest.mark.ranks
def test_every_strategy_goes_on_with_every_others_scale(ranks: RankPool, tmp_path: Path) -> None:
    saved = {}
    for name, world_size in SAVERS:
        (tmp_path / name).mkdir()
        ranks.run(world_size, save, name, tmp_path / name)
        saved[name] = read_index(find_checkpoint(tmp_path / name)).loss_scale or {}
        # DeepSpeed forgives the first overflow; so its scale has fallen twice, and it forgives none now.
        zero = name.startswith("zero")
        assert saved[name] == {"scale": 2.0 ** (14 if zero else 13), "clean_steps": 1} | (
            {"hysteresis": 1} if zero else {}
        )
    checkpoints = [find_checkpoint(tmp_path / name) for name in saved]
    for name, world_size in SAVERS:
        for rank in ranks.run(world_size, states, name, checkpoints):
            for state, expected in zip(rank, saved.values(), strict=True):
                assert {key: state[key] for key in ("scale", "clean_steps")} == {
                    key: expected[key] for key in ("scale", "clean_steps")
                }
                if name.startswith("zero"):
                    assert state["hysteresis"] == expected.get("hysteresis", 2)


@pytest.mark.ranks
def test_a_checkpoint_without_a_scale_begins_it_anew(ranks: RankPool, tmp_path: Path) -> None:
    """One of another precision, and any that an older version saved."""
    ranks.run(2, train_and_save, "fsdp", tmp_path, "fp32", 2)
    checkpoint = find_checkpoint(tmp_path)
    assert b"loss_scale" not in (checkpoint / "index.json").read_bytes()
    for name in ("ddp", "zero2"):
        for (state,) in ranks.run(2, states, name, [checkpoint]):
            assert state["scale"] == 2.0**16 and state["clean_steps"] == 0


@pytest.mark.parametrize(
    "state",
    (
        {"scale": 0.0, "clean_steps": 0},
        {"scale": -2.0, "clean_steps": 0},
        {"scale": "65536", "clean_steps": 0},
        {"scale": 65536.0, "clean_steps": -1},
        {"scale": 65536.0},
        {"scale": 65536.0, "clean_steps": 1, "other": 1},
        [65536.0],
    ),
)
def test_a_damaged_scale_is_named(state: Any) -> None:
    content = {"format": "shardrun checkpoint", "version": 1, "step": 1, "saved_by": {}, "run": {}, "files": {}}
    path = Path("checkpoints/step_00000001/index.json")
    good = {**content, "tensors": {}, "loss_scale": {"scale": 65536.0, "clean_steps": 3, "hysteresis": 2}}
    index = parse_index(json.dumps(good).encode(), path)
    assert index.loss_scale == good["loss_scale"] and parse_index(index_json(index), path) == index
    with pytest.raises(ValueError, match="is damaged: its loss scale is not as it should be"):
        parse_index(json.dumps({**good, "loss_scale": state}).encode(), path)
