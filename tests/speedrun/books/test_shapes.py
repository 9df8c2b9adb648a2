"""The shapes that need no torch are those of the model, and the groups those of the policy table."""

import dataclasses

import pytest
import torch

from speedrun.books import shapes
from speedrun.config import Config, ModelConfig, OptimizerConfig
from speedrun.model import GPT
from speedrun.optim import policy
from speedrun.presets import PRESETS
from tests.strategies.test_features import OTHERS, STREAM

VARIANTS = [
    *(config for _, config in PRESETS.values()),
    Config(model=ModelConfig(norm="layer", bias=True, positions="learned", mlp_width=99, tied_head=True)),
    Config(model=ModelConfig(norm="rms", bias=True, pad_vocab_to=64)),
    Config(model=ModelConfig(heads=3, width=48, **STREAM)),
    Config(model=ModelConfig(norm="layer", bias=True, pad_vocab_to=64, **OTHERS)),
    Config(model=ModelConfig(attention_gate=True), optimizer=OptimizerConfig(normuon=True, adamw_every=2)),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_shapes_and_groups_are_those_of_the_model(config: Config) -> None:
    with torch.device("meta"):
        model = GPT(config.model)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert list(shapes.shapes_from(config.model).items()) == list(expected.items())
    classes = {
        path: type(module).__name__ for path, module in model.named_modules() if path and len(list(module.parameters()))
    }
    classes = {path: name for path, name in classes.items() if name != "ModuleList"}
    assert shapes.module_classes(config.model, expected) == classes
    for name in ("muon", "adamw"):
        normuon = config.optimizer.normuon and name == "muon"
        optimizer = dataclasses.replace(config.optimizer, name=name, normuon=normuon)
        expected_groups = policy.parameter_groups(expected, optimizer)
        found = shapes.ledger_groups(dataclasses.replace(config, optimizer=optimizer))
        assert [(g.name, g.parameters, g.whole_matrix) for g in found] == [
            (g.name, g.parameters, g.rule.whole_matrix) for g in expected_groups
        ]
        buffers = [len(g.rule.buffers) for g in expected_groups]  # per element, float32
        assert [g.state_bytes for g in found] == [4 * count for count in buffers]
        assert [g.second_moments for g in found] == [bool(g.rule.matrix_buffers) for g in expected_groups]
