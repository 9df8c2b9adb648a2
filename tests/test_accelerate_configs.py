"""The accelerate config files, read by accelerate itself: what each selects and what it hands to the ranks."""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from strategies import catalogue

CONFIGS = Path(__file__).parent.parent / "accelerate_configs"
STRATEGIES = [name for name in catalogue.names() if name != "single"]
ONE_MACHINE = ["single", *STRATEGIES, "fsdp_no_reshard", "fsdp_offload", "zero3_offload"]
EXPECTED = (
    {f"{name}.yaml" for name in ONE_MACHINE}
    | {f"cpu/{name}.yaml" for name in ONE_MACHINE}
    | {f"cpu/{name}_bf16.yaml" for name in ["single", *STRATEGIES]}
    | {f"multi_node/{name}.yaml" for name in STRATEGIES}
)
DISTRIBUTED_TYPE = {
    "single": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "hsdp": DistributedType.FSDP,
    "zero1": DistributedType.DEEPSPEED,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}

every_config = pytest.mark.parametrize("name", sorted(EXPECTED))


def strategy_of(name: str) -> str:
    """`cpu/fsdp_bf16.yaml` → `fsdp`."""
    return Path(name).stem.split("_")[0]


def environment_of(name: str, *overrides: str) -> dict[str, str]:
    """What `accelerate launch --config_file NAME OVERRIDES` adds to the environment, without launching."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), *overrides, "script.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    return launched_environment(arguments, defaults)


def launched_environment(arguments: Namespace, defaults: Any) -> dict[str, str]:
    """The same from what accelerate has parsed and filled in."""
    if arguments.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if defaults.mixed_precision is not None else [])]
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        return prepare_deepspeed_cmd_env(arguments)[1]
    if arguments.use_fsdp or arguments.multi_gpu:
        return prepare_multi_gpu_env(arguments)
    return prepare_simple_launcher_cmd_env(arguments)[1]


def test_the_files_are_the_ones_promised() -> None:
    assert {str(path.relative_to(CONFIGS).as_posix()) for path in CONFIGS.rglob("*.yaml")} == EXPECTED


@every_config
def test_accelerate_reads_strategy_precision_and_processes(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / name))
    assert isinstance(config, ClusterConfig)
    strategy, folder = strategy_of(name), name.split("/")[0] if "/" in name else ""
    assert config.distributed_type == DISTRIBUTED_TYPE[strategy]
    assert config.use_cpu == (folder == "cpu")
    assert config.mixed_precision == ("no" if folder == "cpu" and "_bf16" not in name else "bf16")
    on_cpu = 4 if strategy == "hsdp" else 2
    assert config.num_processes == (1 if strategy == "single" else {"": 8, "cpu": on_cpu, "multi_node": 16}[folder])
    sizes = config.parallelism_config.values()
    assert math.prod(sizes) == (config.num_processes if strategy == "hsdp" else 1)
    assert config.num_machines == (2 if folder == "multi_node" else 1)
    assert config.deepspeed_config.get("zero_stage") == (int(strategy[-1]) if strategy.startswith("zero") else None)


@every_config
def test_only_a_single_process_is_launched_quietly(name: str) -> None:
    """Else accelerate's own launcher prints a traceback after its last word. torchrun has its summary to say."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), "script.py"])
    assert bool(_validate_launch_command(arguments)[0].quiet) == (strategy_of(name) == "single")


@every_config
def test_the_ranks_learn_what_was_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a rank knows of the file is the environment that accelerate makes of it."""
    for variable in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(variable, raising=False)
    environment = environment_of(name)
    strategy = strategy_of(name)
    assert environment["ACCELERATE_MIXED_PRECISION"] == load_config_from_file(str(CONFIGS / name)).mixed_precision
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (strategy in ("fsdp", "hsdp"))
    assert (environment.get("ACCELERATE_USE_DEEPSPEED") == "true") == strategy.startswith("zero")
    if strategy in ("fsdp", "hsdp"):
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "Block"
        assert environment.get("FSDP_OFFLOAD_PARAMS", "false") == str("offload" in name).lower()
        assert environment["FSDP_RESHARD_AFTER_FORWARD"] == ("false" if "no_reshard" in name else "true")
    if strategy.startswith("zero"):
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == strategy[-1]
        for part in ("OPTIMIZER", "PARAM"):
            device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE", "none")
            assert device == ("cpu" if "offload" in name else "none")
    # accelerate passes use_cpu on only to a single process; the others see that no GPU is visible.
    cpu = environment.get("ACCELERATE_USE_CPU") == "True" or environment.get("CUDA_VISIBLE_DEVICES", "").startswith(
        "-1,-1"
    )
    assert cpu == name.startswith("cpu/")


@pytest.mark.parametrize("name", ["cpu/ddp.yaml", "cpu/fsdp.yaml", "cpu/zero2.yaml", "ddp.yaml"])
def test_another_number_of_processes_on_the_command_line(name: str) -> None:
    for processes in ("1", "3"):
        arguments = launch_command_parser().parse_args(
            ["--config_file", str(CONFIGS / name), "--num_processes", processes, "script.py"]
        )
        arguments, _, _ = _validate_launch_command(arguments)
        assert arguments.num_processes == int(processes)
        assert arguments.main_process_port == 0  # two launches at a time do not meet on one port


@every_config
def test_the_file_opens_with_its_purpose_and_its_own_command(name: str) -> None:
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert lines[: len(comment)] == comment and 2 <= len(comment) <= 5
    assert f"accelerate launch --config_file accelerate_configs/{name} " in "\n".join(comment)
    assert yaml.safe_load("\n".join(lines[len(comment) :])) == yaml.safe_load("\n".join(lines))
