"""A machine without room, with a port taken, with settings of an earlier day."""

import errno
import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from shardrun.doctor import launcher, machine, shell
from strategies.select import Launch
from tests.speedrun.test_select import launched
from tests.test_accelerate_configs import CONFIGS

MIB, GIB = 2**20, 2**30


def room(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=total, used=total - free, free=free))


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
@pytest.mark.parametrize(
    ("total", "free", "gpus", "status", "fix"),
    [
        (64 * MIB, 64 * MIB, 8, "failure", "--shm-size"),
        (64 * MIB, 64 * MIB, 0, "warning", "--shm-size"),
        (16 * GIB, 1 * MIB, 8, "failure", "ls -lS"),
        (16 * GIB, 1 * MIB, 1, "warning", "ls -lS"),
        (16 * GIB, 15 * GIB, 8, "ok", ""),
    ],
)
def test_shared_memory_too_small_or_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int, gpus: int, status: str, fix: str
) -> None:
    room(monkeypatch, total, free)
    (line,) = machine.shared_memory(gpus, str(tmp_path))
    assert line.status == status and fix in line.fix
    (line,) = machine.shared_memory(gpus, str(tmp_path / "missing"))
    assert line.status == "failure" and line.fix.startswith("sudo chmod")


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        loopback, line = machine.ports(port)
        assert loopback.status == "ok" and line.status == "warning"
        assert str(port) in line.said and "--main_process_port 0" in line.fix
        if sys.platform == "linux":
            assert f"(process {os.getpid()})" in line.said
    assert [line.status for line in machine.ports(port)] == ["ok", "ok"]


def test_a_loopback_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refused)
    (line,) = machine.ports()
    assert line.status == "failure" and "Connection refused" in line.said and line.fix


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for free, status in ((100 * MIB, "failure"), (5 * GIB, "warning"), (50 * GIB, "ok")):
        room(monkeypatch, 100 * GIB, free)
        lines = list(machine.disk())
        assert {line.status for line in lines} == {status} and all(bool(line.fix) == (status != "ok") for line in lines)
        assert str(tmp_path) in lines[0].said
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert [line.status for line in machine.disk()] == ["failure", "failure", "warning"]


def test_memory_of_the_machine_and_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def container(limit: str) -> str:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
        (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\nslab 2\n")
        return str(tmp_path)

    for available, limit, status, whose in (
        (64 * GIB, "max", "ok", "64.0 GiB free"),
        (2 * GIB, "max", "warning", "2.0 GiB free"),
        (GIB // 2, "max", "failure", "0.5 GiB free"),
        (64 * GIB, str(GIB * 5 // 2), "failure", "0.5 GiB left of this container's limit"),  # 2.5 - (3 - 1)
    ):
        monkeypatch.setattr(psutil, "virtual_memory", lambda available=available: SimpleNamespace(available=available))
        line, _ = machine.memory(container(limit))
        assert line.status == status and line.said.startswith(whose)
    assert machine.container_room(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("text", "means"),
    [
        (
            "distributed_type: FSDP\nnum_processes: 4\nmixed_precision: bf16\nfsdp_config: {fsdp_version: 2}\n",
            "fsdp on 4",
        ),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n", "which Shardrun refuses (fsdp_version 1"),
        ("a: [", "which Shardrun refuses"),
    ],
)
@pytest.mark.parametrize("variable", ("HF_HOME", "XDG_CACHE_HOME", "HOME"))
def test_accelerates_default_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, text: str, means: str
) -> None:
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert [line.status for line in launcher.default_config()] == ["ok"]
    below = {"HF_HOME": "", "XDG_CACHE_HOME": "huggingface", "HOME": ".cache/huggingface"}[variable]
    path = tmp_path / below / "accelerate" / "default_config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (line,) = launcher.default_config()
    assert line.status == "warning" and str(path) in line.said and means in line.said
    monkeypatch.setattr(shell, "current", lambda: "bash")
    (line,) = launcher.default_config()
    assert line.fix == f"mv {path} {path}.old"


def test_the_default_config_is_looked_for_where_accelerate_does() -> None:
    from accelerate.commands.config.config_args import default_config_file

    assert str(launcher.default_config_path()) == default_config_file


def test_variables_of_an_earlier_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in launcher.RANK_VARIABLES:
            monkeypatch.delenv(name)
    assert [line.status for line in launcher.environment_variables()] == ["ok"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(shell, "current", lambda: "fish")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    failure, warning = launcher.environment_variables()
    assert failure.status == "failure" and failure.fix == "set -e ACCELERATE_USE_CPU"
    assert warning.status == "warning" and warning.fix == "set -e ACCELERATE_USE_FSDP FSDP_VERSION RANK"
    # Which strategy it is, the config file decides.
    launch: Launch = launched(monkeypatch, CONFIGS / "cpu/ddp.yaml", 2)
    assert launch.strategy == "ddp"
