"""DeepSpeed's configuration, completed where the accelerate config says nothing."""

from collections.abc import Mapping
from typing import Any

from strategies.base import Settings
from strategies.zero.defaults import replaced_defaults


def deepspeed_config(settings: Settings, parameters: int, clip: float, accumulation: int) -> dict[str, Any]:
    """The engine's configuration: what the accelerate config says, completed where it leaves things open.

    parameters: elements of the model, on which some defaults depend (strategies/zero/defaults.py).
    """
    config = {key: value for key, value in settings.engine.items() if value != "auto"}
    zero = section(config, "zero_optimization")
    for key, value in replaced_defaults(parameters).items():
        if int(zero["stage"]) == 3 or not key.startswith("stage3_"):
            zero.setdefault(key, value)
    config["zero_optimization"] = zero
    config.pop("train_batch_size", None)
    config |= {
        "train_micro_batch_size_per_gpu": 1,  # only ever multiplied for DeepSpeed's own throughput figures
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        **{name: {**section(config, name), "enabled": settings.precision == name} for name in ("bf16", "fp16")},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return config


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a section of DeepSpeed's settings says, and does not leave to others."""
    return {key: value for key, value in (config.get(name) or {}).items() if value != "auto"}
