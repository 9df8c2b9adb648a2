"""How a global batch is cut: the ranks together see exactly it, whatever their number and the micro-batch."""

import dataclasses

import pytest
import torch

from speedrun.config import Config, DataConfig, ScheduleConfig, Stage
from speedrun.data import batch_hash, open_data
from speedrun.stages import number_of_steps, resolve
from speedrun.train import cut_batches
from tests.speedrun.runs import launch_of

DATA = DataConfig(sequence_length=32, global_batch=48, eval_tokens=320)


@pytest.mark.parametrize("micro_batch", (0, 1, 2))
@pytest.mark.parametrize("world_size", (1, 2, 3, 4, 8))
def test_ranks_and_micro_batches_put_together_are_the_global_batch(world_size: int, micro_batch: int) -> None:
    config = Config(data=dataclasses.replace(DATA, micro_batch=micro_batch))
    data = open_data(config.data, 257, seed=1)
    cuts = [cut_batches(config, launch_of("ddp", rank, world_size)) for rank in range(world_size)]
    assert {cut.accumulation for cut in cuts} == {48 // world_size // micro_batch if micro_batch else 1}
    for step in (0, 1, 700):
        parts = [data.batch(step, first, last) for cut in cuts for first, last in cut.micro_batches()]
        inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        assert len(inputs) == 48
        assert batch_hash(inputs, targets) == data.global_batch_hash(step)


def test_a_larger_micro_batch_than_the_share_is_the_share() -> None:
    config = Config(data=dataclasses.replace(DATA, micro_batch=32))
    assert cut_batches(config, launch_of("ddp", 1, 3)).micro_batches() == [(16, 32)]


@pytest.mark.parametrize(
    ("world_size", "data", "sentence"),
    [
        (5, {}, "data.global_batch 48 does not divide over 5 ranks; use 50, or another number of processes."),
        (4, {"global_batch": 1}, "data.global_batch 1 does not divide over 4 ranks; use 4,"),
        (2, {"global_batch": 0}, "data.global_batch 0 does not divide over 2 ranks; use 2,"),
        (2, {"micro_batch": 7}, "data.micro_batch 7 does not divide a rank's 24 rows .* use a divisor of 24."),
        (2, {"micro_batch": -6}, "data.micro_batch -6 does not divide a rank's 24 rows"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(world_size: int, data: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cut_batches(Config(data=dataclasses.replace(DATA, **data)), launch_of("ddp", 0, world_size))


def test_an_accelerate_config_that_contradicts_the_run_is_refused() -> None:
    config = Config(data=dataclasses.replace(DATA, micro_batch=4))
    launch = launch_of("zero2", 0, 4)
    for agreeing in (3, 1, "auto"):
        launch.engine["gradient_accumulation_steps"] = agreeing
        assert cut_batches(config, launch).accumulation == 3
    launch.engine["gradient_accumulation_steps"] = 4
    with pytest.raises(ValueError, match="gradient_accumulation_steps 4, but .* makes 3; .* data.micro_batch to 3."):
        cut_batches(config, launch)
    launch.engine.update(gradient_accumulation_steps=3, gradient_clipping=1.0)
    assert cut_batches(config, launch).accumulation == 3
    launch.engine["gradient_clipping"] = 0.5
    with pytest.raises(ValueError, match="gradient_clipping 0.5, but optimizer.clip is 1.0; .* --optimizer.clip 0.5"):
        cut_batches(config, launch)


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
        stages=(Stage(0.25), Stage(0.5, global_batch=24, micro_batch=2), Stage(1.0, 48, sequence_length=40))
    ),
)


@pytest.mark.parametrize("world_size", (1, 2, 3, 4))
def test_stages_are_the_same_global_batches_for_every_world_size(world_size: int) -> None:
    sections = resolve(STAGED, 12)
    data = open_data(STAGED.data, 257, 1, sections)
    cuts = {
        section.name: [cut_batches(STAGED, launch_of("ddp", r, world_size), section) for r in range(world_size)]
        for section in sections
    }
    assert [len(rows[0].micro_batches()) for rows in cuts.values()] == [1, 12 // world_size, 1]
    for section in sections:
        for step in (section.first, section.last - 1):
            pieces = [cut for rank in cuts[section.name] for cut in rank.micro_batches()]
            parts = [data.batch(step, first, last) for first, last in pieces]
            inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            assert inputs.shape == (section.global_batch, section.sequence_length)
            assert batch_hash(inputs, targets) == data.global_batch_hash(step)


def test_a_stage_whose_batch_does_not_divide_is_named() -> None:
    section = resolve(STAGED, 12)[1]
    with pytest.raises(ValueError, match="schedule.stages.1.global_batch 24 does not divide over 5 ranks; use 25"):
        cut_batches(STAGED, launch_of("ddp", 0, 5), section)
