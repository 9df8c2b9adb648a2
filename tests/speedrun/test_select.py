"""From what accelerate exports to a Launch: what is refused, in which words. tests/test_accelerate_configs.py says
what accelerate exports for the shipped files; here the launched process is played by its environment.
"""

import builtins
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from shardrun.configs import resolve_config
from strategies import catalogue, select
from tests.test_accelerate_configs import CONFIGS, environment_of

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES")


def launched(
    monkeypatch: pytest.MonkeyPatch, file: Path, processes: int, *options: str, started: int | None = None
) -> select.Launch:
    """What rank 0 makes of `accelerate launch --config_file FILE OPTIONS` with that many processes."""
    with monkeypatch.context() as patch:
        for variable in VARIABLES:
            patch.delenv(variable, raising=False)
        # Of a launch's environment this process has all but what one of two accelerate versions leaves alone.
        for variable, value in environment_of(str(file), "--num_processes", str(processes), *options).items():
            patch.setenv(variable, value)
        world = str(processes if started is None else started)
        if world != "1" or "single" not in file.name:
            for variable, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", world)):
                patch.setenv(variable, value)
        command = ["accelerate", "launch", "--config_file", str(file), "--num_processes", str(processes), *options]
        pretend_parent(patch, [*command, "-m", "speedrun.train", "tiny"])
        return select.launched()


def pretend_parent(patch: pytest.MonkeyPatch, words: list[str]) -> None:
    original, parent = psutil.Process, os.getppid()
    fake = Namespace(cmdline=lambda: words)
    patch.setattr(psutil, "Process", lambda *pid: fake if pid == (parent,) else original(*pid))


def changed(tmp_path: Path, name: str, old: str, new: str) -> Path:
    """A shipped config with one thing replaced."""
    text = (CONFIGS / name).read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / Path(name).name
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


@pytest.mark.parametrize("precision", ("", "_bf16"))
@pytest.mark.parametrize("name", ("single", "ddp", "fsdp", "zero1", "zero2", "zero3"))
def test_the_shipped_cpu_configs_start_as_what_they_say(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    file = CONFIGS / "cpu" / f"{name}{precision}.yaml"
    launch = launched(monkeypatch, file, 1 if name == "single" else 3)
    assert (launch.strategy, launch.precision, launch.cpu) == (name, "bf16" if precision else "fp32", True)
    assert launch.world_size == (1 if name == "single" else 3)
    assert launch.config_file == str(file) and launch.config["use_cpu"] is True
    if name == "fsdp":
        assert launch.engine == {"reshard_after_forward": True, "wrap": ["Block"]}
    if name.startswith("zero"):
        assert launch.engine["zero_optimization"]["stage"] == int(name[-1])


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("fsdp", "fsdp_version: 2", "fsdp_version: 1", "fsdp_version 1 is not supported; write fsdp_version: 2"),
        ("fsdp", "TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "SIZE_BASED_WRAP is not supported; write TRANSFORMER"),
        ("zero2", "zero_stage: 2", "zero_stage: 0", "zero_stage 0 is not supported; write 1, 2 or 3, or use ddp.yaml"),
    ],
)
def test_settings_that_are_not_supported_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, old: str, new: str, sentence: str
) -> None:
    file = changed(tmp_path, f"cpu/{name}.yaml", old, new)
    with pytest.raises(ValueError, match=sentence) as error:
        launched(monkeypatch, file, 2)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ("ddp", "fsdp", "zero2"))
def test_what_the_command_line_asks_of_the_trainer_is_honoured(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Under every strategy: accelerate itself reads these two under DeepSpeed alone."""
    options = ("--gradient_clipping", "0.5", "--gradient_accumulation_steps", "4", "--dynamo_backend", "inductor")
    launch = launched(monkeypatch, CONFIGS / "cpu" / f"{name}.yaml", 2, *options)
    assert {ask: said.value for ask, said in launch.asks.items()} == {"clip": 0.5, "accumulation": 4, "compile": True}
    assert str(launch.asks["clip"]) == "accelerate launch: --gradient_clipping 0.5"
    assert launched(monkeypatch, CONFIGS / "cpu" / f"{name}.yaml", 2).asks == {}


def test_one_process_for_cpu_is_said_to_come_from_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="accelerate launch --cpu starts one process, and 2 were asked for; leave out"):
        launched(monkeypatch, CONFIGS / "cpu/ddp.yaml", 2, "--cpu", started=1)


def test_use_cpu_as_text_means_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    file = changed(tmp_path, "cpu/single.yaml", "use_cpu: true", "use_cpu: 'false'")
    assert launched(monkeypatch, file, 1).cpu is False


@pytest.mark.parametrize("precision", ("", "_bf16"))
def test_hsdp_starts_on_the_mesh_that_its_config_says(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    launch = launched(monkeypatch, CONFIGS / f"cpu/hsdp{precision}.yaml", 4)
    assert (launch.strategy, launch.precision) == ("hsdp", "bf16" if precision else "fp32")
    assert launch.engine == {"reshard_after_forward": True, "wrap": ["Block"], "replicas": 2}
    wider = launched(monkeypatch, CONFIGS / "cpu/hsdp.yaml", 6, "--parallelism_config_dp_shard_size", "3")
    assert wider.engine["replicas"] == 2


@pytest.mark.parametrize(
    ("old", "new", "processes", "sentence"),
    [
        (
            "main_process_port",
            "main_process_port",
            6,
            "2 replicas .* of 2 ranks .* are 4 ranks, but there are 6; change",
        ),
        (
            "dp_replicate_size: 2",
            "tp_size: 2",
            4,
            "parallelism_config_tp_size 2 is not supported; remove it or write 1",
        ),
        (
            "dp_replicate_size: 2",
            "cp_size: 2",
            4,
            "parallelism_config_cp_size 2 is not supported; remove it or write 1",
        ),
        ("dp_shard_size: 2", "dp_shard_size: 1", 2, "replicas of one rank each shard nothing: use ddp.yaml"),
        ("dp_shard_size: 2", "dp_shard_size: 0", 2, "dp_shard_size 0 is not supported; write a whole number"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_by_the_file_and_by_the_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str, processes: int, sentence: str
) -> None:
    file = changed(tmp_path, "cpu/hsdp.yaml", old, new)
    with pytest.raises(ValueError, match=sentence) as error:
        launched(monkeypatch, file, processes)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
    file.write_text(file.read_text().replace("num_processes: 4", f"num_processes: {processes}"))
    with pytest.raises(ValueError, match=sentence):
        resolve_config(file)


@pytest.mark.parametrize("kind", ("MEGATRON_LM", "MULTI_XPU", "MULTI_NPU", "XLA"))
def test_a_distributed_type_that_no_strategy_claims_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """By the file and by the launch alike; it would train as plain DDP."""
    sentence = f"distributed_type {kind} is not supported; write one of NO, MULTI_GPU, FSDP, DEEPSPEED"
    file = changed(tmp_path, "cpu/ddp.yaml", "MULTI_GPU", kind)
    with pytest.raises(ValueError, match=sentence):
        resolve_config(file)
    if kind == "XLA":
        return  # accelerate starts its own launcher for those
    with pytest.raises(ValueError, match=sentence):
        launched(monkeypatch, file, 2)


def test_multi_cpu_is_refused_because_accelerate_starts_one_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = changed(tmp_path, "cpu/ddp.yaml", "MULTI_GPU", "MULTI_CPU")
    with pytest.raises(ValueError, match="distributed_type MULTI_CPU is not supported; .*MULTI_GPU with use_cpu: true"):
        launched(monkeypatch, file, 1)


@pytest.mark.parametrize("name", ("single", "ddp"))
def test_fewer_processes_than_asked_for_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """single.yaml with --num_processes 2 starts one; so would any silent fallback."""
    sentence = {"single": "--num_processes 2 is not supported; distributed_type NO starts one process, not 2"}
    with pytest.raises(ValueError, match=sentence.get(name, f"cpu/{name}.yaml: 2 processes were asked for but 1")):
        launched(monkeypatch, CONFIGS / "cpu" / f"{name}.yaml", 2, started=1)


@pytest.mark.parametrize("name", ("single", "ddp", "fsdp_no_reshard", "zero3", "multi_node/fsdp"))
def test_a_config_for_gpus_names_the_one_for_cpus(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = CONFIGS / f"{name}.yaml"
    with pytest.raises(ValueError, match=f"{file} is for GPUs .* accelerate_configs/(.*) to run on CPU") as error:
        launched(monkeypatch, file, 1 if name == "single" else 2)
    suggested = str(error.value).split("use accelerate_configs/")[1].split(" ")[0]
    assert (CONFIGS / suggested).is_file() and Path(suggested).name == file.name


def test_a_config_of_ones_own_for_gpus_names_the_cpu_config_of_its_strategy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("ddp", "fsdp", "zero1"):
        file = tmp_path / f"my_{name}_run.yaml"
        file.write_text((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"), encoding="utf-8")
        with pytest.raises(ValueError, match=f"use accelerate_configs/cpu/{name}.yaml to run on CPU"):
            launched(monkeypatch, file, 2)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launched(monkeypatch, CONFIGS / "ddp.yaml", 2).cpu is False
    with pytest.raises(ValueError, match="ddp.yaml: 3 processes on this machine, which has 2 GPUs; .*num_processes 2"):
        launched(monkeypatch, CONFIGS / "ddp.yaml", 3)


def test_without_deepspeed_zero_names_fsdp_as_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "deepspeed":
            raise ImportError("No module named 'deepspeed'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="ZeRO needs DeepSpeed, which is not installed here .*fsdp.yaml"):
        launched(monkeypatch, CONFIGS / "cpu/zero2.yaml", 2)


def test_a_deepspeed_config_file_decides_the_precision_it_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = tmp_path / "ds.json"
    file = changed(tmp_path, "cpu/zero2.yaml", "zero_stage: 2", f"deepspeed_config_file: {engine}")
    file.write_text(file.read_text().replace("mixed_precision: 'no'\n", ""))
    engine.write_text('{"zero_optimization": {"stage": 1}, "bf16": {"enabled": true}}')
    launch = launched(monkeypatch, file, 2)
    assert (launch.strategy, launch.precision) == ("zero1", "bf16")
    engine.write_text('{"zero_optimization": {"stage": 1}, "fp16": {"enabled": 1}}')
    with pytest.raises(ValueError, match=f"{engine}: fp16.enabled 1 is not supported; .* on GPUs alone"):
        launched(monkeypatch, file, 2)


@pytest.mark.parametrize(
    "start",
    [
        ["/usr/bin/python3", "/home/me/bin/accelerate", "launch"],
        ["/home/me/bin/accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
        ["python", "-m", "accelerate.commands.accelerate_cli", "launch"],
    ],
)
def test_every_way_of_calling_accelerate_launch_is_recognised(
    monkeypatch: pytest.MonkeyPatch, start: list[str]
) -> None:
    options = ["--mixed_precision=bf16", "--config_file=a.yaml", "--num-processes", "3", "--cpu"]
    pretend_parent(monkeypatch, [*start, *options, "-m", "speedrun.train", "tiny", "--num_processes", "9"])
    command = select._launch_command()
    assert command and (command.config_file, command.num_processes, command.cpu) == ("a.yaml", 3, True)


@pytest.mark.parametrize("words", (["bash"], ["accelerate", "config"], ["torchrun", "-m", "speedrun.train"], []))
def test_other_parents_are_no_accelerate_launch(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    pretend_parent(monkeypatch, words)
    assert select._launch_command() is None


@pytest.mark.parametrize("strategy", ("ddp", "fsdp", "zero2"))
def test_a_process_group_on_gpus_is_told_its_device(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """torch warns at every barrier of a group that does not know it. Everything that would touch a GPU stands in."""
    started: list[dict[str, Any]] = []
    devices: list[torch.device] = []
    state = Namespace(num_processes=2, process_index=1, device=torch.device("cuda", 1))
    store = torch.distributed.HashStore()
    for variable in ("TORCHELASTIC_RESTART_COUNT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("accelerate.PartialState", lambda **_: state)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: bool(started))
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url, rank, world: iter([(store, rank, world)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **options: started.append(options))
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(catalogue, "engine", lambda *_: None)
    select.start(select.Launch(strategy, 1, 1, 2, 2, "bf16", cpu=False), timeout=7.0)
    (options,) = started
    assert options["device_id"] == torch.device("cuda", 1) and devices == [torch.device("cuda", 1)]
    assert (options["rank"], options["world_size"], options["timeout"].seconds) == (1, 2, 7)
