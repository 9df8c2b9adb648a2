"""DeepSpeed's settings: each has a place, and those that cannot run are refused with a way out."""

import dataclasses
from typing import Any

import pytest

from shardrun.certify.equivalence import Case
from speedrun.books.shapes import scenario_of
from strategies import catalogue
from strategies.fsdp.settings import fsdp_refusal
from strategies.zero.settings import CANNOT_RUN, EXACT, NO_EFFECT, NOT_PREDICTED, unpredicted, zero_refusal

ELSEWHERE = {
    *("stage", "offload_param", "offload_optimizer", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"),
    "stage3_gather_fp16_weights_on_model_save",  # an older name
}
"""Keys of zero_optimization that are read as something else: the strategy, offload, other names."""


def test_every_key_of_zero_optimization_has_one_place() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    keys = {field.alias or name for name, field in fields.items()} - ELSEWHERE
    places = [EXACT, NO_EFFECT, NOT_PREDICTED, CANNOT_RUN]
    known = [key.removeprefix("zero_optimization.") for place in places for key in place]
    assert keys - set(known) == set()
    assert len(known) == len(set(known))


REFUSED: list[tuple[int, dict[str, Any], str]] = [
    (1, {"zero_optimization": {"legacy_stage1": True}}, "zero_optimization.legacy_stage1"),
    (2, {"zero_optimization": {"compute_grad_norm": False}}, "zero_optimization.compute_grad_norm"),
    (2, {"zero_optimization": {"allgather_bucket_size": 3}}, "zero_optimization.allgather_bucket_size"),
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
def test_what_cannot_run_is_refused_with_a_way_out(stage: int, engine: dict[str, Any], key: str) -> None:
    found = zero_refusal(stage, "fp32", engine, ranks=3, cpu=True)
    assert found and found[0] == key and not found[1].endswith(".")
    engine = {**engine, "zero_optimization": {"stage": stage, **engine.get("zero_optimization", {})}}
    on_cpus_alone = key.endswith("quantized_gradients")
    sentence = catalogue.books(f"zero{stage}").refuses(
        scenario_of(Case().config(), f"zero{stage}", 3, "fp32", 1, engine)
    )
    assert sentence.startswith(f"{key} ") and sentence.endswith(".") or on_cpus_alone


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_neutral_values_and_auto_are_as_good_as_silence(stage: int) -> None:
    said = {**{key: neutral for key, (neutral, _) in CANNOT_RUN.items()}, "gradient_predivide_factor": 1.0}
    said |= {key: neutral for key, (neutral, _) in NOT_PREDICTED.items()}
    for every in (said, dict.fromkeys(said, "auto")):
        engine: dict[str, Any] = {}
        for key, value in every.items():
            section, _, name = key.rpartition(".")
            (engine.setdefault(section, {}) if section else engine)[name] = value
        assert zero_refusal(stage, "bf16", engine, ranks=2, cpu=True) is None
        assert unpredicted(stage, "bf16", engine) == {}


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
