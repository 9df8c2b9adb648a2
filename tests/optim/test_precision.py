"""Orthogonalisation runs in bf16 where the device computes in it: which devices do, and what a run makes of that."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from speedrun.config import CheckpointConfig, Config, OptimizerConfig
from speedrun.optim import precision
from speedrun.optim.policy import parameter_groups
from speedrun.optim.precision import choose_dtype, emulated_bf16, native_bf16
from speedrun.optim.rules import Muon
from tests.ranks import RankPool
from tests.speedrun.runs import read, small, train_here

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def cpu_with(patch: pytest.MonkeyPatch, avx512_bf16: bool = False, amx: bool = False, **limits: str) -> None:
    patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        patch.delenv(variable, raising=False)
    for variable, value in limits.items():
        patch.setenv(variable, value)


def test_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with(monkeypatch)
    assert native_bf16(CPU) == (False, "this processor has no bf16 instructions")
    cpu_with(monkeypatch, avx512_bf16=True)
    assert native_bf16(CPU) == (True, "this processor has AVX512_BF16")
    cpu_with(monkeypatch, avx512_bf16=True, amx=True)
    assert native_bf16(CPU) == (True, "this processor has AMX")


@pytest.mark.parametrize(
    ("limit", "native"),
    [
        ("AVX2", False),
        ("avx2", False),  # oneDNN minds no case
        ("AVX512_CORE_VNNI", False),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_AMX", True),
        ("ALL", True),
        ("DEFAULT", True),
    ],
)
def test_onednns_limit_counts(monkeypatch: pytest.MonkeyPatch, limit: str, native: bool) -> None:
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        cpu_with(monkeypatch, avx512_bf16=True, **{variable: limit})
        assert native_bf16(CPU)[0] is native
        assert native or native_bf16(CPU)[1] == f"{variable}={limit} forbids this processor's AVX512_BF16"
    cpu_with(monkeypatch, avx512_bf16=True, ONEDNN_MAX_CPU_ISA="ALL", DNNL_MAX_CPU_ISA="AVX2")
    assert native_bf16(CPU)[0], "the new name goes before the old one"


def test_what_this_processor_says_is_what_linux_says() -> None:
    """The flags that the kernel lists, read independently of torch."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "flags" not in (text := flags.read_text()):
        return  # not an x86 Linux
    words = set(text.split())
    assert torch.cpu._is_avx512_bf16_supported() == ("avx512_bf16" in words)


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype, why = choose_dtype("auto", GPU)
    assert dtype == ("bfloat16" if native else "float32")
    assert why == f"a GPU of capability {capability[0]}.{capability[1]} {'has' if native else 'has no'} bf16"


def test_what_is_asked_for_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with(monkeypatch)
    assert choose_dtype("bfloat16", CPU) == ("bfloat16", "as asked")
    assert "emulated" in emulated_bf16(CPU) and "mixed_precision 'no'" in emulated_bf16(CPU)
    cpu_with(monkeypatch, amx=True)
    assert choose_dtype("float32", CPU) == ("float32", "as asked")
    assert not emulated_bf16(CPU)


def test_the_rule_follows_where_nobody_has_resolved_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lessons take a recipe straight from the configuration."""
    (group,) = parameter_groups({"blocks.0.mlp.up.weight": (6, 4)}, OptimizerConfig())
    matrices = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    results = {dtype: Muon().transform(matrices, {**group.options, "orthogonalization_dtype": dtype}) for dtype in BOTH}
    assert not torch.equal(*results.values())
    for native, dtype in ((False, "float32"), (True, "bfloat16")):
        cpu_with(monkeypatch, avx512_bf16=native)
        assert torch.equal(Muon().transform(matrices, group.options), results[dtype])


BOTH = ("float32", "bfloat16")


def train_on_unlike_hosts(config: Config, native: list[bool]) -> str:
    """On a rank: a run under ZeRO-2 on hosts of which some compute in bf16; returns what Muon ran in."""
    used: list[str] = []

    def transform(self: Muon, matrices: torch.Tensor, options: dict[str, Any], states: Any = ()) -> torch.Tensor:
        used.append(options["orthogonalization_dtype"])
        return original(self, matrices, options, states)

    with pytest.MonkeyPatch.context() as patch:
        original = Muon.transform
        patch.setattr(Muon, "transform", transform)
        patch.setattr(precision, "native_bf16", lambda device: (native[dist.get_rank()], "a test"))
        train_here("zero2", config)
    (dtype,) = set(used)
    return dtype


@pytest.mark.ranks
def test_all_ranks_take_rank_0s_and_a_resumed_run_keeps_it(ranks: RankPool, tmp_path: Path) -> None:
    config = small(steps=2, out=str(tmp_path), checkpoint=CheckpointConfig(every=2), resume="auto")
    for steps, hosts in ((2, [True, False]), (4, [False, False])):
        config = dataclasses.replace(config, steps=steps)
        assert ranks.run(2, train_on_unlike_hosts, config, hosts) == ["bfloat16"] * 2
        record = read(tmp_path / "run", "config.json")
        assert record["run"]["optimizer"]["orthogonalization_dtype"] == "bfloat16"
    asked = dataclasses.replace(config.optimizer, orthogonalization_dtype="float32")
    config = dataclasses.replace(config, steps=6, optimizer=asked)
    assert ranks.run(2, train_on_unlike_hosts, config, [True, True]) == ["float32"] * 2
