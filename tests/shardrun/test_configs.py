"""What the verbs read out of a config file is what a launched process makes of it."""

from pathlib import Path

import pytest
import torch

from shardrun.configs import resolve_config
from shardrun.launch import shipped_names
from tests.speedrun.test_select import launched
from tests.test_accelerate_configs import CONFIGS


@pytest.mark.parametrize("name", shipped_names())
def test_resolved_from_the_file_is_launched(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Strategy, world size, precision, device and engine, for every shipped config."""
    resolved = resolve_config(CONFIGS / f"{name}.yaml")
    if not resolved.cpu:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: resolved.world_size)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch = launched(monkeypatch, CONFIGS / f"{name}.yaml", resolved.world_size)
    for field in ("strategy", "world_size", "precision", "cpu"):
        assert getattr(resolved, field) == getattr(launch, field), field
    assert (resolved.engine, resolved.asks) == (launch.engine, launch.asks)


def test_what_another_strategy_reads_is_said_to_be_without_effect(tmp_path: Path) -> None:
    path = tmp_path / "ddp.yaml"
    path.write_text((CONFIGS / "cpu/ddp.yaml").read_text() + "fsdp_config:\n  fsdp_version: 2\n")
    effects = {key: effect for key, _, effect in resolve_config(path).lines}
    assert effects["fsdp_version"] == "without effect: only read with distributed_type FSDP"
