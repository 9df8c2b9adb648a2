"""How a global batch is cut: the ranks together see exactly it, whatever their number and the micro-batch."""

import dataclasses

import pytest
import torch

from shardrun.configs import resolve_config
from shardrun.launch import shipped_config
from speedrun.config import Config, DataConfig, ScheduleConfig, StageConfig
from speedrun.data import batch_hash, open_data
from speedrun.presets import PRESETS
from speedrun.run.asked import honoured
from speedrun.stages import Batches, cut_rows, number_of_steps, resolve_stages, validation_rows
from tests.speedrun.runs import STRATEGIES

DATA = DataConfig(sequence_length=32, global_batch=48, eval_tokens=320)


def cut(config: Config, world_size: int) -> Batches:
    """Of a run without stages."""
    (stage,) = resolve_stages(config, config.steps, world_size)
    return stage.batches


@pytest.mark.parametrize("micro_batch", (0, 1, 2))
@pytest.mark.parametrize("world_size", (1, 2, 3, 4, 8))
def test_ranks_and_micro_batches_put_together_are_the_global_batch(world_size: int, micro_batch: int) -> None:
    config = Config(data=dataclasses.replace(DATA, micro_batch=micro_batch))
    data = open_data(config.data, 257, seed=1)
    batches = cut(config, world_size)
    assert batches.accumulation == (48 // world_size // micro_batch if micro_batch else 1)
    for step in (0, 1, 700):
        parts = [data.batch(step, *piece) for rank in range(world_size) for piece in batches.micro_batches(rank)]
        inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        assert len(inputs) == 48
        assert batch_hash(inputs, targets) == data.global_batch_hash(step)


@pytest.mark.parametrize(
    ("rows", "at_most", "micro_batch"), [(24, 16, 12), (24, 7, 6), (24, 12, 12), (16, 32, 16), (7, 6, 1), (5, 0, 5)]
)
def test_a_micro_batch_has_at_most_so_many_rows(rows: int, at_most: int, micro_batch: int) -> None:
    batches = cut_rows(3 * rows, 3, at_most)
    assert (batches.micro_batch, batches.accumulation) == (micro_batch, rows // micro_batch)
    assert batches.micro_batches(1)[0] == (rows, rows + micro_batch)
    assert batches.micro_batches(1)[-1][1] == 2 * rows and len(batches.micro_batches(1)) == batches.accumulation


@pytest.mark.parametrize("world_size", (1, 2, 4, 8))
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_cut_for_1_2_4_and_8_ranks_under_every_shipped_config(preset: str, world_size: int) -> None:
    """Stage by stage, with what the accelerate config of every strategy sets; no rank is left out, no row too much."""
    preset_config = PRESETS[preset][1]
    configs = [honoured(preset_config, resolve_config(shipped_config(name)).asks, world_size) for name in STRATEGIES]
    assert all(config == preset_config for config in configs)
    for stage in resolve_stages(preset_config, number_of_steps(preset_config), world_size):
        pieces = [piece for rank in range(world_size) for piece in stage.batches.micro_batches(rank)]
        assert [row for piece in pieces for row in range(*piece)] == list(range(stage.global_batch))
        assert stage.batches.micro_batch <= (stage.micro_batch or stage.global_batch)


@pytest.mark.parametrize(
    ("world_size", "data", "sentence"),
    [
        (5, {}, "data.global_batch 48 does not divide over 5 ranks; use 50, or another number of processes."),
        (4, {"global_batch": 1}, "data.global_batch 1 does not divide over 4 ranks; use 4,"),
        (2, {"global_batch": 0}, "data.global_batch 0 does not divide over 2 ranks; use 2,"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(world_size: int, data: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cut(Config(data=dataclasses.replace(DATA, **data)), world_size)


@pytest.mark.parametrize(("world_size", "rows"), [(1, 16), (2, 16), (4, 16), (8, 16)])
def test_a_validation_takes_no_more_tokens_than_a_training_pass(world_size: int, rows: int) -> None:
    """speedrun: 32 rows of 1024 tokens in training at most, and validation rows of 2048."""
    config = PRESETS["speedrun"][1]
    assert validation_rows(config, resolve_stages(config, config.steps, world_size)) == rows


def test_a_validation_takes_a_row_at_least() -> None:
    config = Config(data=dataclasses.replace(DATA, micro_batch=1, eval_sequence_length=64))
    assert validation_rows(config, resolve_stages(config, 1, 2)) == 1
    config = Config(data=DATA)
    assert validation_rows(config, resolve_stages(config, 1, 2)) == 24


def test_steps_stay_within_the_token_budget() -> None:
    config = Config(data=DATA, steps=10)
    assert number_of_steps(config) == 10
    assert number_of_steps(dataclasses.replace(config, tokens=48 * 32 * 7 + 1)) == 7
    assert number_of_steps(dataclasses.replace(config, tokens=48 * 32 * 99)) == 10
    with pytest.raises(ValueError, match="a token budget of 1535 allow no step of 1536 tokens"):
        number_of_steps(dataclasses.replace(config, tokens=48 * 32 - 1))


STAGED = Config(
    data=DataConfig(sequence_length=16, global_batch=12, eval_tokens=320),
    schedule=ScheduleConfig(
        stages=(
            StageConfig(0.25),
            StageConfig(0.5, global_batch=24, micro_batch=2),
            StageConfig(1.0, 48, sequence_length=40),
        )
    ),
)


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
def test_stages_are_the_same_global_batches_for_every_world_size(world_size: int) -> None:
    stages = resolve_stages(STAGED, 12, world_size)
    data = open_data(STAGED.data, 257, 1, stages)
    assert [stage.batches.accumulation for stage in stages] == [1, 12 // world_size, 1]
    for stage in stages:
        for step in (stage.first, stage.last - 1):
            pieces = [piece for rank in range(world_size) for piece in stage.batches.micro_batches(rank)]
            parts = [data.batch(step, first, last) for first, last in pieces]
            inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            assert inputs.shape == (stage.global_batch, stage.sequence_length)
            assert batch_hash(inputs, targets) == data.global_batch_hash(step)


def test_a_stage_whose_batch_does_not_divide_is_named() -> None:
    stage = resolve_stages(STAGED, 12)[1]
    with pytest.raises(ValueError, match="schedule.stages.1.global_batch 24 does not divide over 5 ranks; use 25"):
        dataclasses.replace(stage, world_size=5)
