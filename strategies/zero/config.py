"""What an accelerate config file says of ZeRO: `distributed_type: DEEPSPEED` and its section, or DeepSpeed's own JSON.
Plain Python, no torch: what accelerate exported is parsed by its own plugin, which is imported where that is asked for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strategies.config_values import flag, read_bounded, section, short

DISTRIBUTED_TYPE = "DEEPSPEED"

EFFECTS = {
    "zero_stage": "1: optimizer states are partitioned; 2: gradients too; 3: parameters too",
    "deepspeed_config_file": "DeepSpeed's own settings, taken whole",
    "gradient_accumulation_steps": "must agree with what data.global_batch and data.micro_batch make",
    "gradient_clipping": "must agree with optimizer.clip",
    "deepspeed_multinode_launcher": "how processes start on the other machines",
    "zero3_init_flag": "not used: the model is built whole on every rank and then partitioned",
}
"""Key of a config → what it does here."""


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config file, as read, asks for this."""
    return short(config.get("distributed_type")) == DISTRIBUTED_TYPE


def written(path: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The strategy's name and DeepSpeed's settings, out of a config file that this claims: accelerate's own keys, or
    the JSON file that they name. Raises ValueError for what is not supported.
    """
    keys = config["deepspeed_config"]
    if file := keys.get("deepspeed_config_file"):
        if not isinstance(file, str):
            raise ValueError(f"{path}: deepspeed_config_file is {short(file)}; write the path of a JSON file.")
        try:
            engine = json.loads(read_bounded(Path(file)))
        except (OSError, RecursionError, ValueError) as error:
            why = str(error).rstrip(".")
            raise ValueError(f"{path}: deepspeed_config_file {short(file)} cannot be read: {why}.") from error
        if not isinstance(engine, dict):
            raise ValueError(
                f"{path}: deepspeed_config_file {short(file)} holds {short(engine)}, not DeepSpeed's settings."
            )
    else:
        engine = {"zero_optimization": {"stage": keys.get("zero_stage", 2)}}
        engine |= {key: keys[key] for key in ("gradient_accumulation_steps", "gradient_clipping") if key in keys}
    stage = section(path, engine, "zero_optimization").get("stage")
    if isinstance(stage, bool) or not isinstance(stage, int) or stage not in (1, 2, 3):
        raise ValueError(
            f"{path}: zero_stage {short(stage)} is not supported; write 1, 2 or 3 (0 is plain DDP: ddp.yaml)."
        )
    return f"zero{stage}", engine


def launched(environ: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Whether what `accelerate launch` exported to this process, or the file that it read, asks for this."""
    return flag(environ, "ACCELERATE_USE_DEEPSPEED")


def exported(shown: str, cpu: bool) -> tuple[str, dict[str, Any]]:
    """As `written`, out of what `accelerate launch` exported. shown: the config's name, for errors."""
    import torch

    from strategies.zero.engine import import_deepspeed

    import_deepspeed(torch.device("cpu" if cpu else "cuda"))  # before accelerate does, which is noisier
    from accelerate.utils import DeepSpeedPlugin

    config = dict(DeepSpeedPlugin().deepspeed_config)
    stage = int(config["zero_optimization"].get("stage", 0))
    if stage not in (1, 2, 3):
        raise ValueError(f"{shown}: zero_stage {stage} is plain DDP; write 1, 2 or 3, or use ddp.yaml.")
    for part in ("offload_optimizer", "offload_param"):
        device = (config["zero_optimization"].get(part) or {}).get("device", "none")
        if device not in (None, "none"):
            raise ValueError(f"{shown}: {part}_device {device!r} is not supported; remove it or write none.")
    return f"zero{stage}", config
