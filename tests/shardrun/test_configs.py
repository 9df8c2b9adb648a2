"""What the verbs read out of a config file is what a launched process makes of it."""

from pathlib import Path

import pytest
import torch

from shardrun.configs import resolve_config
from shardrun.launch import shipped_names
from strategies.base import Settings
from strategies.mesh import Place
from strategies.zero.engine import deepspeed_config
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
    if not resolved.strategy.startswith("zero"):
        assert resolved.engine == launch.engine
        return
    # accelerate fills DeepSpeed's config with "auto"; what the engine gets out of the two is the same.
    place = Place(0, resolved.world_size, torch.device("cpu"))
    given = [
        deepspeed_config(Settings(place, launch.precision, engine), 1000, 1.0, 1)["zero_optimization"]
        for engine in (resolved.engine, launch.engine)
    ]
    unset = {
        key for key in given[1] if key.startswith("offload_") or key == "stage3_gather_16bit_weights_on_model_save"
    }
    assert given[0] == {key: value for key, value in given[1].items() if key not in unset}
    offload = {key: given[1][key]["device"] for key in unset if key.startswith("offload_")}
    assert set(offload.values()) <= {"none", None}


def test_what_a_key_of_another_strategy_does_is_not_claimed(tmp_path: Path) -> None:
    """A mesh beside DDP, or FSDP's section in it: nothing here reads them."""
    path = tmp_path / "ddp.yaml"
    text = (CONFIGS / "cpu/ddp.yaml").read_text()
    path.write_text(
        text + "parallelism_config:\n  parallelism_config_dp_replicate_size: 2\nfsdp_config:\n  fsdp_version: 2\n"
    )
    effects = {key: effect for key, _, effect in resolve_config(path).lines}
    assert effects["parallelism_config_dp_replicate_size"] == effects["fsdp_version"]
    assert effects["fsdp_version"].startswith("ignored")
