"""Saved by any strategy at any world size, loaded by any other at any other: training goes on as if uninterrupted."""

import functools
from pathlib import Path

import pytest
import torch

from shardrun.certify.equivalence import WEIGHT_TOLERANCE, run_reference
from strategies.checkpoint.folder import find_checkpoint
from strategies.checkpoint.format import read_index
from strategies.checkpoint.shards import Shards
from tests.ranks import RankPool
from tests.strategies.checkpoint.runs import CASE, RECORD, SAVED, STEPS, Half, load_and_train, train_and_save
from tests.strategies.small import STRATEGIES

PLACES = [("single", 1), *((name, world_size) for name in STRATEGIES for world_size in (1, 2, 3, 4))]
NAMES = ("single", *STRATEGIES)
TOLERANCE = 1e-5


def world_of(name: str, number: int) -> int:
    return 1 if name == "single" else 1 + number % 4


# Every ordered pair of strategies once, the world sizes so that every pair of those comes up too.
PAIRS = [
    ((saver, world_of(saver, i)), (loader, world_of(loader, i // 4 + j)))
    for i, saver in enumerate(NAMES)
    for j, loader in enumerate(NAMES)
]


def test_the_pairs_cover_all_strategies_and_world_sizes() -> None:
    assert {(a[0], b[0]) for a, b in PAIRS} == {(a, b) for a in NAMES for b in NAMES}
    assert {(a[1], b[1]) for a, b in PAIRS} == {(a, b) for a in (1, 2, 3, 4) for b in (1, 2, 3, 4)}


@functools.cache
def uninterrupted() -> tuple[list[float], dict[str, torch.Tensor]]:
    """All steps in one process without anything of `strategies`."""
    trace = run_reference(CASE)
    return trace.losses, trace.weights


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, Half]]:
    """By strategy and world size: a checkpoint after SAVED steps, and the same run, uninterrupted."""
    result = {}
    for name, world_size in PLACES:
        folder = tmp_path_factory.mktemp(f"{name}{world_size}")
        result[name, world_size] = folder, ranks.run(world_size, train_and_save, name, folder, "fp32", STEPS)[0]
    return result


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("saver", NAMES)
def test_a_run_goes_on_under_any_other_strategy(
    ranks: RankPool, saved: dict[tuple[str, int], tuple[Path, Half]], saver: str
) -> None:
    losses, weights = uninterrupted()
    for (name, saved_world), (loader, world_size) in PAIRS:
        if name == saver:
            checkpoint = find_checkpoint(saved[name, saved_world][0])
            assert checkpoint.name == f"step_{SAVED:08d}"
            after = ranks.run(world_size, load_and_train, loader, checkpoint)[0]
            where = f"{name} on {saved_world} → {loader} on {world_size}"
            apart = max(abs(ours - theirs) / theirs for ours, theirs in zip(after.losses, losses[SAVED:], strict=True))
            assert apart < TOLERANCE, f"{where}: a loss differs by {apart:.1e}"
            for parameter, weight in weights.items():
                difference = (after.weights[parameter] - weight).abs().max().item()
                assert difference < TOLERANCE, f"{where}: {parameter} differs by {difference:.1e}"


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(("name", "world_size"), PLACES)
def test_under_the_same_strategy_and_world_size_every_bit_is_the_same(
    ranks: RankPool, saved: dict[tuple[str, int], tuple[Path, Half]], name: str, world_size: int
) -> None:
    folder, whole = saved[name, world_size]
    check_bits(ranks.run(world_size, load_and_train, name, find_checkpoint(folder), "fp32", STEPS)[0], whole)


@pytest.mark.ranks
@pytest.mark.slow
def test_state_per_row_and_sums_of_gradients_go_along(ranks: RankPool, tmp_path: Path) -> None:
    """The record's optimizer and stages, saved within a stage and between two of AdamW's steps, along a chain."""
    weights = run_reference(RECORD).weights
    whole = ranks.run(4, train_and_save, "zero1", tmp_path, "fp32", RECORD.steps, RECORD, 3)[0]
    check_bits(
        ranks.run(4, load_and_train, "zero1", find_checkpoint(tmp_path), "fp32", RECORD.steps, RECORD)[0], whole, 3
    )
    state = read_index(find_checkpoint(tmp_path)).tensors
    assert state["second_moment/blocks.0.mlp.up.weight"].shape == (101,) and "gradient_sum/embed.weight" in state
    with Shards(find_checkpoint(tmp_path)) as shards:
        for name in ("second_moment/blocks.0.mlp.up.weight", "gradient_sum/embed.weight"):
            assert shards.whole(name, state[name]).abs().max() > 0
    for name, world_size in (("single", 1), ("ddp", 3), ("fsdp", 4), ("zero2", 3), ("zero3", 2)):
        after = ranks.run(world_size, load_and_train, name, find_checkpoint(tmp_path), "fp32", RECORD.steps, RECORD)[0]
        for parameter, weight in weights.items():
            difference = (after.weights[parameter] - weight).abs().max().item()
            assert difference < WEIGHT_TOLERANCE, f"{name} on {world_size}: {parameter} differs by {difference:.1e}"
        for parameter, buffers in whole.state.items():
            for buffer, expected in buffers.items():
                assert (after.state[parameter][buffer] - expected).abs().max() < WEIGHT_TOLERANCE, (name, buffer)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_in_bf16_too(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """Masters are float32, the model's copies are made from them again: bit for bit."""
    whole = ranks.run(2, train_and_save, name, tmp_path, "bf16", STEPS)[0]
    check_bits(ranks.run(2, load_and_train, name, find_checkpoint(tmp_path), "bf16", STEPS)[0], whole)


def check_bits(after: Half, whole: Half, saved: int = SAVED) -> None:
    assert after.losses == whole.losses[saved:]
    for name, weight in whole.weights.items():
        assert torch.equal(after.weights[name], weight), name
        assert whole.state[name].keys() == after.state[name].keys()
        for buffer, state in whole.state[name].items():
            assert torch.equal(after.state[name][buffer], state), (name, buffer)
            assert buffer == "gradient_sum" or state.abs().max() > 0, (name, buffer)  # summed up and taken
