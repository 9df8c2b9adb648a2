"""Cases in which a reader of configs goes wrong without a word: DeepSpeed's JSON that is nearly right, and options of
accelerate launch beside a file.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from shardrun.configs import resolve_config
from shardrun.explain import in_columns
from strategies.config_file import Asked, asked
from strategies.config_keys import COMMAND_LINE, Said

Z2: dict[str, Any] = {"zero_optimization": {"stage": 2}}
YAML = "distributed_type: DEEPSPEED\nuse_cpu: true\ngpu_ids: '-1,-1'\nnum_processes: 2\nmain_process_port: 0\n"


def write(folder: Path, engine: dict[str, Any] | str, more: str = "") -> Path:
    (folder / "ds.json").write_text(engine if isinstance(engine, str) else json.dumps(engine), encoding="utf-8")
    file = folder / "mine.yaml"
    file.write_text(f"{YAML}{more}deepspeed_config: {{deepspeed_config_file: {folder / 'ds.json'}}}\n")
    return file


def beside(file: Path, **options: Any) -> Asked:
    return asked(file, {name: Said(name, value, COMMAND_LINE) for name, value in options.items()})


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (Z2 | {"bf16.enabled": True}, "bf16.enabled True is not supported; write it as a section, without a dot"),
        (Z2 | {"bf16": {"enabled": {"a": 1}}}, "bf16.enabled {'a': 1} is not supported; write one value"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": {"a": True}}}, "overlap_comm {'a': True} is not supp"),
        (Z2 | {"gradient_accumulation_steps": {"x": 2}}, "gradient_accumulation_steps {'x': 2} is not supported"),
        (Z2 | {"communication_data_type": {"x": "fp16"}}, "communication_data_type {'x': 'fp16'} is not supported"),
        (Z2 | {"communication_data_type": "float16"}, "communication_data_type float16 is not supported; write fp32"),
        ({"zero_optimization": {"stage": None}}, "zero_optimization.stage is missing"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "none"}},
            "offload_optimizer none is not supported; wr",
        ),
        (Z2 | {"bf16": True}, "bf16 True is not supported; write a section with keys of its own"),
        (Z2 | {"bfloat16": True}, "bfloat16 True is not supported; write a section"),
        ({"zero_optimization": {"stage": 2, "cpu_offload_param": True}}, "cpu_offload_param True is not supported"),
        (Z2 | {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 16}, "train_batch_size 8 is not supported"),
        (Z2 | {"train_batch_size": 8, "gradient_accumulation_steps": 3}, "write the product of micro-batch, accumul"),
        (Z2 | {"train_batch_size": 7}, "train_batch_size 7 is not supported"),
        (Z2 | {"compile": {"enabled": True}}, "compile.enabled True is not supported; remove it: --compile"),
        ("\ufeff{}", "begins with a byte order mark: save it as UTF-8 without one"),
    ],
)
def test_nearly_right_json_is_refused_by_its_own_name(tmp_path: Path, engine: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve_config(write(tmp_path, engine))
    said = str(error.value)
    assert sentence in said and said.startswith(str(tmp_path / "ds.json")) and "\n" not in said


def test_null_sections_are_silence(tmp_path: Path) -> None:
    engine = Z2 | {"fp16": None, "bf16": None, "communication_data_type": "FP16"}
    engine["zero_optimization"] = {"stage": 2, "offload_optimizer": None}
    found = resolve_config(write(tmp_path, engine))
    assert (found.strategy, found.precision) == ("zero2", "fp32") and found.engine["communication_data_type"] == "fp16"


def test_the_command_line_beside_a_json(tmp_path: Path) -> None:
    file = write(tmp_path, Z2)
    with pytest.raises(ValueError, match="--offload_optimizer_device cpu is not supported; write it in .*ds.json"):
        beside(file, offload_optimizer_device="cpu")
    file = write(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}})
    assert (
        beside(file, offload_optimizer_device="cpu").engine["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    )
    file = write(tmp_path, Z2 | {"bf16": {"enabled": True}})
    assert beside(file, mixed_precision="bf16").precision == "bf16"
    with pytest.raises(ValueError, match="--mixed_precision no is not supported; .*ds.json: bf16.enabled True says"):
        beside(file, mixed_precision="no")


@pytest.mark.parametrize(
    "option", [{"megatron_lm_tp_degree": 2}, {"fp8_format": "E4M3"}, {"mpirun_hostfile": "x"}, {"zero_stage": 3}]
)
def test_options_for_other_launches_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    file = tmp_path / "ddp.yaml"
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: 'no'\n")
    with pytest.raises(ValueError, match=f"accelerate launch: --{next(iter(option))} "):
        beside(file, **option)


def test_what_does_nothing_in_this_run_is_said_to(tmp_path: Path) -> None:
    zero = {"stage": 2, "stage3_max_live_parameters": 5, "sub_group_size": 7, "zero_hpz_partition_size": 2}
    lines = resolve_config(
        write(tmp_path, {"zero_optimization": zero, "fp16": {"loss_scale": 0}}, "debug: null\n")
    ).lines
    effects = {key: effect for key, _, effect in lines}
    assert len(effects) == len(lines)
    for key in ("stage3_max_live_parameters", "sub_group_size", "zero_hpz_partition_size"):
        assert effects[f"zero_optimization.{key}"] == "without effect: only read in stage 3"
    assert effects["fp16.loss_scale"] == "without effect: fp16 is off"
    hpz = {"stage": 3, "zero_hpz_partition_size": 2}
    effects = {key: effect for key, _, effect in resolve_config(write(tmp_path, {"zero_optimization": hpz})).lines}
    assert effects["zero_optimization.zero_hpz_partition_size"].endswith("is not predicted")


def test_every_line_is_within_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for one of a single word: it can be copied."""
    monkeypatch.setenv("COLUMNS", "90")
    line = in_columns("data_efficiency.data_sampling." * 4 + "path", "/a" * 60, "without effect: " + "word " * 40, 90)
    assert all(len(each) <= 90 or len(each.split()) == 1 for each in line.splitlines()), line
