"""The stage table: shares become whole steps, fields fall back to their sections, nonsense is named."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedrun.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, StageConfig
from speedrun.model.rope import yarn_scale
from speedrun.stages import number_of_steps, resolve_stages, stage_at, tokens_before
from tests.ranks import RankPool
from tests.speedrun.runs import STRATEGIES, in_folder, metrics, read, small, train_here

MODEL = ModelConfig(window_short=128, window_long=384, long_layers=(1,))


def config_of(*stages: StageConfig, steps: int = 100, tokens: int | None = None) -> Config:
    return Config(
        model=MODEL,
        data=DataConfig(sequence_length=10, global_batch=4, micro_batch=2),
        optimizer=OptimizerConfig(muon_momentum=0.95),
        schedule=ScheduleConfig(stages=stages),
        steps=steps,
        tokens=tokens,
    )


RECORD = (
    StageConfig(1 / 3, micro_batch=4),
    StageConfig(2 / 3, global_batch=8, window_short=384, window_long=896, lr=1.52),
    StageConfig(1.0, global_batch=12, sequence_length=20, window_long=1408, lr=1.73, momentum=0.9),
)


def test_fields_fall_back_and_windows_add_up() -> None:
    first, second, third = resolve_stages(config_of(*RECORD), 100)
    assert [(s.first, s.last) for s in (first, second, third)] == [(0, 33), (33, 67), (67, 100)]
    assert (first.global_batch, first.sequence_length, first.micro_batch) == (4, 10, 4)
    assert (second.global_batch, second.sequence_length, second.micro_batch) == (8, 10, 2)
    assert (third.global_batch, third.sequence_length, third.micro_batch) == (12, 20, 2)
    assert third.windows == ((128, 384), (384, 896), (128, 1408)) and first.windows == ((128, 384),)
    assert [s.lr for s in (first, second, third)] == [1.0, 1.52, 1.73]
    assert [s.momentum for s in (first, second, third)] == [0.95, 0.95, 0.9]


def test_no_table_is_one_stage() -> None:
    (only,) = resolve_stages(config_of(), 7)
    assert (only.first, only.last, only.name, only.tokens_per_step) == (0, 7, "data", 40)
    assert only.windows == ((128, 384),) and only.lr == 1.0 and only.momentum == 0.95


@given(steps=st.integers(3, 300), budget=st.integers(300, 50_000))
def test_tokens_are_counted_step_by_step_and_the_budget_is_kept(steps: int, budget: int) -> None:
    config = config_of(*RECORD, steps=steps, tokens=budget)
    taken = number_of_steps(config)

    def total(steps: int) -> int:
        first, second = round(steps / 3), round(steps * 2 / 3)
        return sum(40 if step < first else 80 if step < second else 240 for step in range(steps))

    assert taken <= steps and total(taken) <= budget
    assert all(total(more) > budget for more in range(taken + 1, steps + 1))
    if taken >= 3:
        stages = resolve_stages(config, taken)
        counted = 0
        for step in range(taken):
            assert tokens_before(stages, step) == counted
            counted += stage_at(stages, step).tokens_per_step
        assert tokens_before(stages, taken) == counted == total(taken)


def test_yarn_turns_no_attention_around() -> None:
    model = ModelConfig(layers=2, yarn=True, window_long=3000, long_layers=(1,))
    for new, refused in ((20, True), (21, False)):
        table = (StageConfig(0.5), StageConfig(window_long=new))
        config = Config(model=model, schedule=ScheduleConfig(stages=table))
        if refused:
            with pytest.raises(ValueError, match="schedule.stages.1.window_long is 20 after 3000"):
                resolve_stages(config, 10)
        else:
            resolve_stages(config, 10)
            assert yarn_scale((3000, new)) > 0


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ((StageConfig(0.5),), "schedule.stages end at 0.5 of the run .* rise from above 0 to 1"),
        ((StageConfig(0.5), StageConfig(0.5), StageConfig(1.0)), "schedule.stages end at 0.5, 0.5, 1.0"),
        ((StageConfig(0.0), StageConfig(1.0)), "schedule.stages end at 0.0, 1.0"),
        ((StageConfig(0.001), StageConfig(1.0)), "schedule.stages.0 .until 0.001. has no step in a run of 100 steps"),
    ],
)
def test_a_table_that_is_none_is_refused(stages: tuple[StageConfig, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve_stages(config_of(*stages), 100)


def test_a_long_window_without_layers_is_refused() -> None:
    config = dataclasses.replace(config_of(StageConfig(window_long=9)), model=ModelConfig())
    with pytest.raises(ValueError, match="schedule.stages.0.window_long = 9 has no layer: .* model.long_layers"):
        resolve_stages(config, 100)


def test_it_needs_no_torch() -> None:
    script = "import sys, speedrun.stages, speedrun.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.ranks
def test_a_staged_run_is_the_same_under_every_strategy(ranks: RankPool, tmp_path: Path) -> None:
    """Batch, row length, accumulation, windows and rates change in mid-run, after an untimed warm-up of all stages."""
    config = small(
        model=dataclasses.replace(small().model, window_short=4, window_long=9, long_layers=(1,), yarn=True),
        data=DataConfig(sequence_length=16, global_batch=12, micro_batch=3, eval_tokens=320),
        optimizer=OptimizerConfig(orthogonalization_dtype="float32", adamw_every=2, normuon=True),
        schedule=ScheduleConfig(
            stages=(StageConfig(0.5), StageConfig(1.0, 24, 32, window_long=20, lr=1.5, momentum=0.8))
        ),
        steps=6,
        untimed_steps=1,
    )
    curves = {}
    for name, world_size in [("single", 1), *((name, 2) for name in STRATEGIES)]:
        out = tmp_path / name
        ranks.run(world_size, train_here, name, in_folder(config, out))
        lines = metrics(out / "run")
        assert [line["tokens"] for line in lines] == [0, 192, 384, 576, 1344, 2112, 2880]
        curves[name] = [(line["train_loss"], line["grad_norm"], line.get("val_loss", 0.0)) for line in lines[1:]]
        for books in read(out / "run", "ledger.json")["ranks"]:
            books["memory"].pop("peak")  # of activations an estimate
            if name == "ddp":  # its buckets are out of sight before the first backward pass
                books["memory"]["after prepare"].pop("gradients")
            entries = [entry for moment in books["memory"].values() for entry in moment.values()]
            entries += [*books["optimizer states by group"].values(), *books["traffic"]]
            assert not [entry for entry in entries if entry["remainder"]]
    for curve in curves.values():
        for ours, reference in zip(curve, curves["single"], strict=True):
            assert ours == pytest.approx(reference, rel=2e-5)
