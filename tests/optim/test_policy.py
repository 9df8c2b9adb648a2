"""The policy table: which parameter of a real model goes where."""

import dataclasses

import pytest
import torch

from speedrun.config import ModelConfig, OptimizerConfig
from speedrun.model import GPT
from speedrun.optim.policy import ParameterGroup, kind_of, parameter_groups
from speedrun.optim.rules import AdamW
from speedrun.presets import PRESETS

SMALL = ModelConfig(layers=2, heads=2, width=8)
MODELS = {
    "modern": SMALL,
    "gated": dataclasses.replace(SMALL, attention_gate=True, width=16),
    "tied": dataclasses.replace(SMALL, tied_head=True),
    "baseline": dataclasses.replace(
        SMALL, positions="learned", mlp="gelu", norm="layer", bias=True, qk_norm=False, tied_head=True
    ),
}


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}


def test_gates_and_tables_are_never_muons() -> None:
    features = dataclasses.replace(
        SMALL,
        width=16,
        bigram_rows=64,
        ngram_width=4,
        smear=True,
        value_embeddings=(1,),
        embedding_skip=True,
        backout=1,
    )
    config = OptimizerConfig(table_lr=0.6, vector_lr=0.4, weight_decay=0.5)
    groups = by_name(parameter_groups(shapes_of(features), config))
    assert groups["table"].parameters == ("bigrams.table.weight", "blocks.1.value_embedding.table.weight")
    assert groups["table"].options["lr"] == 0.6 and groups["table"].options["weight_decay"] == 0.5
    for name in ("bigrams.scale", "backout.strength"):
        assert name in groups["vector"].parameters
    assert groups["gate"].parameters == ("smear.gate.weight", "blocks.1.value_embedding.gate.weight")
    assert "bigrams.up.weight" in groups["block matrix"].parameters  # multiplied like any other matrix
    assert [group.rule.whole_matrix for group in groups.values()] == [True, False, False, False, False, False]


def by_name(groups: list[ParameterGroup]) -> dict[str, ParameterGroup]:
    return {group.name: group for group in groups}


@pytest.mark.parametrize("optimizer", ("muon", "adamw"))
@pytest.mark.parametrize("config", (*MODELS.values(), *(config.model for _, config in PRESETS.values())))
def test_every_parameter_is_in_exactly_one_group(config: ModelConfig, optimizer: str) -> None:
    shapes = shapes_of(config)
    groups = parameter_groups(shapes, OptimizerConfig(name=optimizer))  # type: ignore[arg-type]
    named = [name for group in groups for name in group.parameters]
    assert sorted(named) == sorted(shapes)
    assert all(group.parameters for group in groups)
    for group in groups:  # in the model's order, on which ZeRO's flat buffers stand
        assert list(group.parameters) == [name for name in shapes if name in group.parameters]


def test_muon_gets_the_matrices_inside_the_blocks_and_nothing_else() -> None:
    for config in MODELS.values():
        for group in parameter_groups(shapes_of(config), OptimizerConfig(name="muon")):
            inside = [
                name.startswith("blocks.") and len(shapes_of(config)[name]) == 2 and "gate" not in name
                for name in group.parameters
            ]
            assert inside == [group.rule.whole_matrix] * len(inside)


def test_adamw_gets_everything_with_the_matrices_own_rate() -> None:
    config = OptimizerConfig(name="adamw", adamw_lr=0.1, embedding_lr=0.2, head_lr=0.3, vector_lr=0.4, weight_decay=0.5)
    groups = by_name(parameter_groups(shapes_of(dataclasses.replace(MODELS["baseline"], tied_head=False)), config))
    assert not any(group.rule.whole_matrix for group in groups.values())
    assert {name: (group.options["lr"], group.options["weight_decay"]) for name, group in groups.items()} == {
        "block matrix": (0.1, 0.5),
        "embedding": (0.2, 0.5),
        "head": (0.3, 0.5),
        "vector": (0.4, 0.0),  # decay is for what multiplies
    }
    assert all(group.options["betas"] == config.betas for group in groups.values())


def test_a_tied_head_is_the_embedding() -> None:
    groups = by_name(parameter_groups(shapes_of(MODELS["tied"]), OptimizerConfig()))
    assert groups["embedding"].parameters == ("embed.weight",) and "head" not in groups
    untied = by_name(parameter_groups(shapes_of(MODELS["modern"]), OptimizerConfig()))
    assert untied["head"].parameters == ("head.weight",)


def test_the_baseline_has_learned_positions_and_vectors() -> None:
    groups = by_name(parameter_groups(shapes_of(MODELS["baseline"]), OptimizerConfig()))
    assert groups["embedding"].parameters == ("embed.weight", "positions.weight")
    assert "norm.weight" in groups["vector"].parameters
    assert all(kind_of(name, shapes_of(MODELS["baseline"])[name]) == "vector" for name in groups["vector"].parameters)


def test_muons_options_are_the_configurations() -> None:
    config = OptimizerConfig(muon_lr=0.7, muon_weight_decay=0.1, orthogonalization="newton_schulz")
    options = by_name(parameter_groups(shapes_of(SMALL), config))["block matrix"].options
    assert options["lr"] == 0.7 and options["weight_decay"] == 0.1 and options["momentum"] == config.muon_momentum
    assert options["orthogonalization"] == "newton_schulz" and options["orthogonalization_steps"] == 5
    assert options["orthogonalization_dtype"] == "auto"


def test_gates_have_a_row_of_their_own() -> None:
    groups = by_name(parameter_groups(shapes_of(MODELS["gated"]), OptimizerConfig(gate_lr=0.4, weight_decay=0.1)))
    assert groups["gate"].parameters == tuple(f"blocks.{i}.attention.gate.weight" for i in range(2))
    assert isinstance(groups["gate"].rule, AdamW)
    assert (groups["gate"].options["lr"], groups["gate"].options["weight_decay"]) == (0.4, 0.0)


def test_what_contradicts_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer.normuon .* optimizer.name = adamw"):
        parameter_groups(shapes_of(SMALL), OptimizerConfig(name="adamw", normuon=True))
    with pytest.raises(ValueError, match="optimizer.adamw_every is 0"):
        parameter_groups(shapes_of(SMALL), OptimizerConfig(adamw_every=0))
