"""Drivers, GPUs and links that do not fit, played by an `nvidia-smi` of our own on the PATH."""

import os
from pathlib import Path

import pytest
import torch

from shardrun.doctor import gpu, python, shell
from shardrun.doctor.gpu import Torch
from shardrun.doctor.topology import links, parse

CUDA_13 = Torch("2.13.0+cu130", (13, 0), False)
CPU = Torch("2.13.0+cpu", (), False)

H100 = "{}, 580.159.03, 81559, {}, NVIDIA H100 80GB HBM3"


def matrix(*rows: str, underlined: bool = False) -> str:
    """As nvidia-smi prints it: tabs, a network card, affinity columns, a legend, and for a terminal underlined."""
    devices = [f"GPU{i}" for i in range(len(rows))]
    header = "\t" + "\t".join([*devices, "NIC0", "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])
    lines = ["\x1b[4m" + header + "\x1b[0m" if underlined else header]
    for device, row in zip(devices, rows, strict=True):
        lines.append(
            "\t".join([device, *(f" {code} " if code == "X" else code for code in row.split())]) + "\tSYS\t0-51\t0\tN/A"
        )
    lines += ["NIC0\t" + "SYS\t" * len(rows) + " X ", "", "Legend:", "", "  X    = Self", "  NV#  = bonded NVLinks"]
    return "\n".join(lines)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Puts an nvidia-smi on the PATH that lists these GPUs, or fails with this complaint."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def place(*listed: str, topology: str = "", complaint: str = "", hangs: bool = False) -> gpu.Driver:
        (tmp_path / "listed").write_text("\n".join(listed) + "\n")
        (tmp_path / "topology").write_text(topology)
        (tmp_path / "complaint").write_text(complaint + "\n")
        answer = f'case "$1" in topo) cat "{tmp_path}/topology";; *) cat "{tmp_path}/listed";; esac'
        if complaint:
            answer = f'cat "{tmp_path}/complaint"; exit 18'
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + ("exec sleep 60\n" if hangs else answer + "\n"))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return gpu.read_driver(timeout=0.5 if hangs else 30)

    return place


def test_eight_sound_gpus(smi) -> None:  # type: ignore[no-untyped-def]
    rows = [" ".join("X" if i == j else "NV18" for j in range(8)) for i in range(8)]
    driver = smi(*(H100.format(i, 4) for i in range(8)), topology=matrix(*rows, underlined=True))
    (line,) = gpu.driver(driver, CUDA_13)
    assert line.status == "ok" and "580.159.03" in line.said
    gpus, joined = gpu.gpus(driver)
    assert gpus.status == joined.status == "ok"
    assert gpus.said == "8× NVIDIA H100 80GB HBM3, 80 GiB each"
    assert joined.said == "NVLink between all GPUs (NV18)"


@pytest.mark.parametrize(
    ("version", "built", "status"),
    [
        ("580.65.06", (13, 0), "ok"),
        ("575.57.08", (13, 0), "failure"),
        ("535.183.01", (12, 8), "ok"),
        ("470.256.02", (12, 8), "failure"),
        ("610.10", (12, 8), "ok"),
    ],
)
def test_a_driver_too_old_for_torchs_cuda(smi, version: str, built: tuple[int, int], status: str) -> None:  # type: ignore[no-untyped-def]
    driver = smi(f"0, {version}, 24564, 1, NVIDIA GeForce RTX 4090")
    (line,) = gpu.driver(driver, Torch("2.13.0", built, False))
    assert line.status == status
    if status == "failure":
        assert version in line.said and f"driver {gpu.OLDEST_DRIVER[built[0]]}" in line.said and line.fix


@pytest.mark.parametrize(
    ("complaint", "fix"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch", "sudo reboot"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "sudo modprobe nvidia"),
        ("Unable to determine the device handle", "nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_answer(smi, complaint: str, fix: str) -> None:  # type: ignore[no-untyped-def]
    (line,) = gpu.driver(smi(complaint=complaint), CUDA_13)
    assert line.status == "failure" and complaint in line.said and line.fix.startswith(fix)


def test_an_nvidia_smi_that_hangs_or_speaks_nonsense(smi) -> None:  # type: ignore[no-untyped-def]
    (line,) = gpu.driver(smi(hangs=True), CUDA_13)
    assert line.status == "failure" and "no answer within" in line.said
    (line,) = gpu.driver(smi("hello"), CUDA_13)
    assert line.status == "failure" and "makes no sense: hello" in line.said


def test_torch_without_cuda_on_a_machine_with_gpus(
    smi,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = smi(H100.format(0, 0))
    (line,) = gpu.driver(driver, CPU)
    assert line.status == "failure" and "without CUDA" in line.said and line.fix == "make setup"
    monkeypatch.setattr(gpu, "ROOT", tmp_path)  # installed, not a checkout
    monkeypatch.setattr(shell, "current", lambda: "bash")
    (line,) = gpu.driver(driver, Torch("2.13.0+rocm6.4", (), True))
    wanted = next(text for text in python.requirements() if text.startswith("torch"))
    assert line.status == "failure" and "AMD" in line.said and line.fix.endswith(f"pip install '{wanted}'")


def test_without_a_driver_everything_runs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu.os.path, "exists", lambda _: False)
    (line,) = gpu.driver(gpu.read_driver(), CUDA_13)
    assert line.status == "ok" and "on CPU" in line.said
    monkeypatch.setattr(gpu.os.path, "exists", lambda path: path == "/proc/driver/nvidia/version")
    (line,) = gpu.driver(gpu.read_driver(), CUDA_13)
    assert line.status == "warning" and "--gpus all" in line.fix


def test_the_installed_torch_is_read_without_loading_it() -> None:
    found = gpu.installed_torch()
    assert found is not None and found.version == torch.__version__
    assert ".".join(map(str, found.cuda)) == (torch.version.cuda or "")
    assert found.rocm == (torch.version.hip is not None)


def test_gpus_of_two_kinds_in_use_and_hidden(smi, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    driver = smi(
        H100.format(0, 41000),
        "1, 580.159.03, 24564, 0, NVIDIA GeForce RTX 4090",
        "2, 580.159.03, [N/A], [N/A], NVIDIA H100 80GB HBM3",
        topology=matrix("X SYS NV4", "SYS X SYS", "NV4 SYS X"),
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    lines = {line.name: line for line in gpu.gpus(driver)}
    assert {line.status for line in lines.values()} == {"warning"} and all(line.fix for line in lines.values())
    assert "--gpu_ids 0,2" in lines["GPUs"].fix
    assert "GPU 0: 40.0 GiB" in lines["GPU memory"].said
    assert "'0,1'" in lines["visible GPUs"].said
    assert "NVLink between GPUs 0–2, but SYS" in lines["links"].said


def test_links_over_pcie() -> None:
    assert parse(matrix("X PHB", "PHB X")) == {(0, 1): "PHB"}
    assert parse(matrix("X")) == {}
    (line,) = links(matrix("X PHB", "PHB X"))
    assert line.status == "ok" and "no NVLink: PHB (the CPU's PCIe bridge)" in line.said
    (line,) = links(matrix("X PIX SYS", "PIX X SYS", "SYS SYS X"))
    assert line.status == "warning" and "SYS (the link between two CPUs)" in line.said and line.fix
    (line,) = links("something else")
    assert line.status == "warning"


def test_what_the_loaded_torch_sees(smi, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    driver = smi(H100.format(0, 0), H100.format(1, 0))
    answer = {
        "gpus": 2, "capabilities": [[9, 0]] * 2, "architectures": ["sm_80", "sm_90"], "bf16": True,
        "nccl": [2, 28, 9], "gloo": True,
    }  # fmt: skip

    def lines(**changes: object) -> dict[str, tuple[str, str]]:
        return {line.name: (line.status, line.said) for line in gpu.loaded_torch({**answer, **changes}, driver)}

    monkeypatch.setattr(gpu.metadata, "requires", lambda _: ["nvidia-nccl-cu13==2.28.9; platform_system == 'Linux'"])
    assert {status for status, _ in lines().values()} == {"ok"}
    assert lines(gpus=0)["torch"] == ("failure", "loaded, it sees 0 of 2 GPUs")
    assert "compute capability 10.0" in lines(capabilities=[[9, 0], [10, 0]])["torch"][1]
    assert lines(capabilities=[[8, 9]] * 2)["torch"][0] == "ok"  # sm_80 runs on 8.9
    assert lines(capabilities=[[10, 0]] * 2, architectures=["sm_90", "compute_90"])["torch"][0] == "ok"
    assert lines(bf16=False)["bf16"][0] == "failure"
    assert lines(gloo=False)["gloo"][0] == "failure"
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/nccl")
    status, said = lines(nccl=[2, 18, 5])["NCCL"]
    assert status == "warning" and "2.18.5 was loaded, torch is built with 2.28.9; LD_LIBRARY_PATH" in said
