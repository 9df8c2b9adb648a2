"""What the accelerate config asks of the trainer: it goes before the preset, not before the trainer's command line."""

from dataclasses import replace

import pytest

from speedrun.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig, StageConfig
from speedrun.model import GPT
from speedrun.presets import PRESETS
from speedrun.run.asked import UNITS, check_units, honoured, options_said
from speedrun.stages import number_of_steps, resolve_stages
from strategies.config_keys import Said

CONFIG = Config(data=DataConfig(global_batch=48, sequence_length=32), optimizer=OptimizerConfig(clip=1.0))


def asks(**values: object) -> dict[str, Said]:
    return {name: Said(f"its_{name}", value, "mine.yaml") for name, value in values.items()}


def test_what_is_asked_goes_before_the_preset() -> None:
    found = honoured(CONFIG, asks(clip=0.0, compile=True, checkpointing="block", accumulation=3), world_size=4)
    assert (found.optimizer.clip, found.compile, found.model.checkpointing) == (0.0, True, "block")
    (stage,) = resolve_stages(found, 10, 4)
    assert (stage.batches.accumulation, stage.batches.micro_batch, stage.global_batch) == (3, 4, 48)
    assert honoured(CONFIG, {}, world_size=4) == CONFIG
    once = honoured(replace(CONFIG, data=replace(CONFIG.data, micro_batch=1)), asks(accumulation=1), world_size=4)
    assert resolve_stages(once, 10, 4)[0].batches.accumulation == 1  # 1 is something that is said, not silence


def test_selective_checkpointing_stays() -> None:
    config = replace(CONFIG, model=ModelConfig(checkpointing="selective"))
    assert honoured(config, asks(checkpointing="block"), world_size=1) == config


def test_accumulation_is_that_of_every_stage() -> None:
    stages = (StageConfig(until=0.5, global_batch=48), StageConfig(until=1.0, global_batch=96))
    found = honoured(replace(CONFIG, schedule=ScheduleConfig(stages=stages)), asks(accumulation=6), world_size=4)
    assert [stage.batches.accumulation for stage in resolve_stages(found, 10, 4)] == [6, 6]
    speedrun = honoured(PRESETS["speedrun"][1], asks(accumulation=2), world_size=8)
    assert {s.batches.accumulation for s in resolve_stages(speedrun, number_of_steps(speedrun), 8)} == {2}


@pytest.mark.parametrize(
    ("options", "asked", "sentence"),
    [
        (
            ["--optimizer.clip", "0.5"],
            {"clip": 1.0},
            "mine.yaml: its_clip 1.0 is asked for, but --optimizer.clip says 0.5",
        ),
        (
            ["--no-compile"],
            {"compile": True},
            "its_compile True is asked for, but --no-compile says not to: remove one",
        ),
        (["--model.checkpointing=none"], {"checkpointing": "block"}, "but --model.checkpointing says none: remove one"),
        (
            ["--data.micro-batch", "6"],
            {"accumulation": 3},
            "makes micro-batches of 4 rows, but --data.micro-batch says 6",
        ),
        (
            [],
            {"accumulation": 5},
            "over 4 ranks cuts a global batch into 20, but data.global_batch is 48: make it a mul",
        ),
        ([], {"accumulation": 100}, "its_accumulation 100 over 4 ranks cuts a global batch into 400, but data.global"),
    ],
)
def test_a_contradiction_is_refused(options: list[str], asked: dict[str, object], sentence: str) -> None:
    config = replace(CONFIG, optimizer=OptimizerConfig(clip=0.5), data=replace(CONFIG.data, micro_batch=6))
    with pytest.raises(ValueError, match=sentence):
        honoured(config, asks(**asked), 4, options_said(options))


def test_the_same_said_twice_is_no_contradiction() -> None:
    said = options_said(["tiny", "--optimizer.clip=1.0", "--data.micro_batch", "4", "--compile", "--steps", "3"])
    assert said == {"optimizer.clip", "data.micro_batch", "compile", "steps"}
    config = replace(CONFIG, data=replace(CONFIG.data, micro_batch=4), compile=True)
    assert honoured(config, asks(clip=1.0, accumulation=3, compile=True), 4, said) == config


def test_the_units_are_the_models_classes() -> None:
    import torch

    with torch.device("meta"):
        classes = {type(module).__name__ for module in GPT(ModelConfig()).modules()}
    assert set(UNITS) < classes
    with pytest.raises(ValueError, match="cls_to_wrap LlamaDecoderLayer is not supported: the model has Block, Att"):
        check_units(["Block", "LlamaDecoderLayer"], "mine.yaml")
