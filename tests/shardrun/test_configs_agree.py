"""Any keys, any values: the file alone (`explain`) and a launch come to the same, and accelerate's launcher starts
whatever is accepted.

The launch is accelerate's own up to where it would start processes; the process is played by its environment. The two
share one reader. What differs is what this compares: what the launcher exports, its command line, where it stumbles.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shardrun.configs import resolve_config
from strategies import catalogue, select
from strategies.config_file import Asked
from strategies.config_keys import DYNAMO, MPIRUN, PARALLELISM, TOP
from strategies.fsdp import config as fsdp
from strategies.zero import config as zero
from tests.speedrun.test_select import VARIABLES, pretend_parent
from tests.test_accelerate_configs import environment_of

VALUES: list[Any] = [
    True,
    False,
    None,
    0,
    1,
    2,
    3,
    -1,
    2.0,
    0.5,
    "true",
    "no",
    "yes",
    "0",
    "2",
    "auto",
    "none",
    "x",
    "",
]
VALUES += [
    "cpu",
    "nvme",
    "bf16",
    "fp16",
    "NO",
    "INDUCTOR",
    "FULL_SHARD",
    "SHARD_GRAD_OP",
    "HYBRID_SHARD",
    "Block",
    "all",
]
VALUES += ["TRANSFORMER_BASED_WRAP", "NO_WRAP", "standard", [], ["Block", "MLP"], {}]

BASE: dict[str, dict[str, Any]] = {
    "NO": {"num_processes": 1},
    "MULTI_GPU": {"num_processes": 2},
    "FSDP": {"num_processes": 4, "fsdp_config": {"fsdp_version": 2}},
    "DEEPSPEED": {"num_processes": 2, "deepspeed_config": {"zero_stage": 2}},
}
SECTION_KEYS = {
    "fsdp_config": sorted(fsdp.KEYS),
    "deepspeed_config": sorted(zero.KEYS),
    "parallelism_config": sorted(PARALLELISM),
    "dynamo_config": sorted(DYNAMO),
    "mpirun_config": sorted(MPIRUN),
}
NOT_TRIED = {"distributed_type", "num_machines", "machine_rank", "main_process_ip", "tpu_use_cluster"}
"""What decides which launcher starts; test_corpus.py has those."""

top = st.dictionaries(st.sampled_from(sorted(set(TOP) - NOT_TRIED)), st.sampled_from(VALUES), max_size=2)
inside = st.dictionaries(
    st.sampled_from([(section, key) for section, keys in SECTION_KEYS.items() for key in keys]),
    st.sampled_from(VALUES),
    max_size=3,
)


def by_launch(monkeypatch: pytest.MonkeyPatch, file: Path) -> select.Launch | str:
    """What rank 0 of a launch makes of the file, or why there is none."""
    with monkeypatch.context() as patch:
        for variable in (*VARIABLES, "ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
            patch.delenv(variable, raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 8)
        patch.setattr(catalogue, "look_here", lambda name, cpu: None)
        try:
            environment = environment_of(str(file))
        except Exception as error:  # accelerate has many
            return f"accelerate launch: {error!r}"
        for variable, value in environment.items():
            patch.setenv(variable, value)
        config = yaml.safe_load(file.read_text())
        if config["distributed_type"] != "NO":
            for variable, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", config["num_processes"])):
                patch.setenv(variable, str(value))
        pretend_parent(patch, ["accelerate", "launch", "--config_file", str(file), "-m", "speedrun.train", "tiny"])
        try:
            return select.launched()
        except ValueError as error:
            return str(error)


def by_file(file: Path) -> Asked | str:
    try:
        return resolve_config(file)
    except ValueError as error:
        return str(error)


def agree(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    read, launch = by_file(file), by_launch(monkeypatch, file)
    if isinstance(read, str):
        # What the model has, which a launch looks at when it has the trainer's options, is all that it may accept.
        assert isinstance(launch, str) or "the model has" in read, (read, launch)
        return
    assert not isinstance(launch, str), launch
    for field in ("strategy", "world_size", "precision", "cpu", "engine", "asks"):
        assert getattr(read, field) == getattr(launch, field), field


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(BASE)), top, inside)
@example("DEEPSPEED", {"mixed_precision": "no"}, {("deepspeed_config", "deepspeed_config_file"): "x"})
@example("FSDP", {}, {("parallelism_config", "parallelism_config_cp_size"): "2"})
@example("MULTI_GPU", {"gpu_ids": "0"}, {})
@example("MULTI_GPU", {"dynamo_backend": False}, {})
@example("NO", {"mixed_precision": False, "use_cpu": "false"}, {})
def test_a_file_and_its_launch_agree(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    top: dict[str, Any],
    inside: dict[tuple[str, str], Any],
) -> None:
    config = {"distributed_type": kind, **BASE[kind]} | top
    for (section, key), value in inside.items():
        config[section] = {**config.get(section, {}), key: value}
    file = tmp_path_factory.getbasetemp() / "agree.yaml"
    file.write_text(yaml.safe_dump(config))
    agree(monkeypatch, file)
