"""DeepSpeed's settings: each has a place, and those that cannot run are refused with a way out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from shardrun.certify.equivalence import Case
from speedrun.books.shapes import scenario_of
from strategies import catalogue
from strategies.config_file import asked
from strategies.fsdp.settings import fsdp_refusal
from strategies.zero import json_keys
from strategies.zero.settings import NOT_PREDICTED, unpredicted

OLD = {"cpu_offload", "cpu_offload_param", "stage3_gather_fp16_weights_on_model_save"}
"""Keys of zero_optimization that are read as another: of an older spelling."""


def asked_of(folder: Path, engine: dict[str, Any], cpu: bool = True, ranks: int = 3) -> Any:
    """What the reader makes of DeepSpeed's settings in a file."""
    (folder / "ds.json").write_text(json.dumps(engine))
    config = {"distributed_type": "DEEPSPEED", "use_cpu": cpu, "num_processes": ranks}
    config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "ds.json")}
    (folder / "config.json").write_text(json.dumps(config))
    return asked(folder / "config.json")


def test_every_key_of_zero_optimization_has_one_place() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    keys = {field.alias or name for name, field in fields.items()} - OLD
    assert keys - {key.partition(".")[0] for key in json_keys.ZERO} == set()


REFUSED: list[tuple[int, dict[str, Any], str]] = [
    (1, {"zero_optimization": {"legacy_stage1": True}}, "zero_optimization.legacy_stage1"),
    (2, {"zero_optimization": {"compute_grad_norm": False}}, "zero_optimization.compute_grad_norm"),
    (3, {"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size"),
    (3, {"zero_optimization": {"zero_hpz_partition_size": 2}}, "zero_optimization.zero_hpz_partition_size"),
    (3, {"zero_optimization": {"zero_quantized_gradients": True}}, "zero_optimization.zero_quantized_gradients"),
    (3, {"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads"),
    (1, {"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
    (1, {"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
    (1, {"communication_data_type": "int8"}, "communication_data_type"),
    (1, {"data_types": {"grad_accum_dtype": "double"}}, "data_types.grad_accum_dtype"),
    (1, {"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype"),
    (2, {"prescale_gradients": True}, "prescale_gradients"),
    (2, {"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
    (
        3,
        {"gradient_predivide_factor": 2.0, "zero_optimization": {"reduce_scatter": False}},
        "gradient_predivide_factor",
    ),
]


@pytest.mark.parametrize(("stage", "engine", "key"), REFUSED)
def test_what_cannot_run_is_refused_with_a_way_out(
    tmp_path: Path, stage: int, engine: dict[str, Any], key: str
) -> None:
    engine = {**engine, "zero_optimization": {"stage": stage, **engine.get("zero_optimization", {})}}
    with pytest.raises(ValueError) as error:
        asked_of(tmp_path, engine)
    sentence = str(error.value)
    assert sentence.startswith(f"{tmp_path / 'ds.json'}: {key} ") and "; " in sentence and sentence.endswith(".")


NEUTRAL = {
    "zero_optimization.legacy_stage1": False,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.zenflow": None,
    "bf16.bf16_master_weights_and_grads": False,
    "bf16.bf16_optimizer_states": False,
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "gradient_predivide_factor": 1.0,
}


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_neutral_values_and_auto_are_as_good_as_silence(tmp_path: Path, stage: int) -> None:
    said = {**NEUTRAL, **{key: neutral for key, (neutral, _) in NOT_PREDICTED.items()}}
    for every in (said, dict.fromkeys(set(said) - {"zero_optimization.leaf_module"}, "auto")):
        engine: dict[str, Any] = {"zero_optimization": {"stage": stage}}
        for key, value in every.items():
            section, _, name = key.rpartition(".")
            (engine.setdefault(section, {}) if section else engine)[name] = value
        found = asked_of(tmp_path, engine, ranks=2)
        assert found.strategy == f"zero{stage}" and unpredicted(stage, "bf16", found.engine) == {}


def test_which_lines_are_not_predicted() -> None:
    engine = {"zero_optimization": {"zero_hpz_partition_size": 2}, "data_types": {"grad_accum_dtype": "half"}}
    assert unpredicted(3, "fp32", engine) == dict.fromkeys(
        ("parameters", "all_gather"), "zero_optimization.zero_hpz_partition_size"
    )
    assert set(unpredicted(1, "bf16", engine)) == {"gradients", "communication buffers"}
    assert unpredicted(2, "bf16", engine) == {}


def test_a_limit_is_predicted_only_where_the_order_of_modules_is_known() -> None:
    """Recomputation calls modules in the backward pass too."""
    config = Case().config()
    books = catalogue.books("zero3")
    for checkpointing, limit, unknown in (("none", 0, False), ("block", 0, True), ("block", 10**9, False)):
        model = dataclasses.replace(config.model, checkpointing=checkpointing)
        limits = {"stage3_max_reuse_distance": limit, "stage3_prefetch_bucket_size": 1000}
        engine = {"zero_optimization": {"stage": 3, **limits}}
        scenario = scenario_of(dataclasses.replace(config, model=model), "zero3", 2, "fp32", 1, engine)
        assert bool(books.not_predicted(scenario)) == unknown, (checkpointing, limit)


@pytest.mark.parametrize(
    ("size", "ranks", "fine"), [(True, 3, True), (2, 4, True), (1, 3, True), (2, 3, False), (0, 2, False)]
)
def test_groups_of_fsdp_between_the_passes_divide_its_ranks(size: int, ranks: int, fine: bool) -> None:
    assert (fsdp_refusal({"reshard_after_forward": size}, ranks) is None) == fine


def test_a_tied_head_in_a_unit_of_its_own_is_refused() -> None:
    engine = {"reshard_after_forward": True, "wrap": ["Block", "Head"]}
    books = catalogue.books("fsdp")
    assert "embed.weight" in books.refuses(scenario_of(Case(tied=True).config(), "fsdp", 2, "fp32", 1, engine))
    assert books.refuses(scenario_of(Case().config(), "fsdp", 2, "fp32", 1, engine)) == ""
