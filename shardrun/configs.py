"""What an accelerate config file resolves to, read without accelerate and without torch, key by key.

`strategies.select` reads what accelerate exports to a launched process; this reads the file, for the verbs that plan
and explain. A test holds the two against each other.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DISTRIBUTED = {"NO": "single", "MULTI_GPU": "ddp", "FSDP": "fsdp", "DEEPSPEED": "zero"}


@dataclass(frozen=True)
class Resolved:
    """A config file as Shardrun understands it."""

    path: Path
    strategy: str
    world_size: int
    precision: str
    cpu: bool
    engine: dict[str, Any]
    lines: list[tuple[str, str, str]] = field(default_factory=list)
    """Key by key: key, value as written (or its default), what it does here."""


def resolve(path: Path) -> Resolved:
    """Read a config. Raises ValueError, in one sentence, where it is none or asks for what is not supported."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no keys; an accelerate config has at least distributed_type and num_processes.")
    kind = str(config.get("distributed_type", "NO"))
    if kind not in DISTRIBUTED:
        hint = " (on CPU too: MULTI_GPU with use_cpu: true)" if kind == "MULTI_CPU" else ""
        raise ValueError(
            f"{path}: distributed_type {kind} is not supported; write one of {', '.join(DISTRIBUTED)}{hint}."
        )
    strategy, engine = DISTRIBUTED[kind], {}
    if strategy == "fsdp":
        engine = _fsdp(path, config.get("fsdp_config") or {})
    if strategy == "zero":
        engine = _deepspeed(path, config.get("deepspeed_config") or {})
        strategy = f"zero{engine['zero_optimization']['stage']}"
    precision = str(config.get("mixed_precision", "no")).lower()
    if precision not in ("no", "false", "bf16"):
        raise ValueError(f"{path}: mixed_precision {precision} is not supported; write 'no' or bf16.")
    resolved = Resolved(
        path=path,
        strategy=strategy,
        world_size=int(config.get("num_processes") or 1),
        precision="bf16" if precision == "bf16" else "fp32",
        cpu=bool(config.get("use_cpu")),
        engine=engine,
    )
    resolved.lines.extend(_explain(config, resolved))
    return resolved


def _fsdp(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Keys with or without the fsdp_ prefix, as accelerate takes them."""
    config = {key.removeprefix("fsdp_"): value for key, value in config.items()}
    if int(config.get("version", 1)) != 2:
        raise ValueError(f"{path}: fsdp_version {config.get('version', 1)} is not supported; write fsdp_version: 2.")
    wrap = config.get("transformer_layer_cls_to_wrap", "Block")
    policy = str(config.get("auto_wrap_policy", "NO_WRAP")).upper()
    return {
        "reshard_after_forward": str(config.get("reshard_after_forward", True)).lower() == "true",
        "wrap": [name.strip() for name in wrap.split(",")] if policy == "TRANSFORMER_BASED_WRAP" else [],
    }


def _deepspeed(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """accelerate's own keys, or the DeepSpeed JSON file that they name."""
    if file := config.get("deepspeed_config_file"):
        try:
            engine = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: deepspeed_config_file {file} cannot be read: {error}.") from error
    else:
        engine = {"zero_optimization": {"stage": config.get("zero_stage", 2)}}
    stage = engine.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"{path}: zero_stage {stage} is not supported; write 1, 2 or 3 (0 is plain DDP: ddp.yaml).")
    return engine


EFFECTS = {
    "use_cpu": "runs on CPU over gloo; without it, on GPUs over NCCL",
    "num_processes": "ranks in all; the global batch is divided over them",
    "num_machines": "machines; num_processes counts the ranks of all of them",
    "machine_rank": "which machine this is",
    "main_process_ip": "where rank 0 is",
    "main_process_port": "where the ranks meet; 0 is any free port",
    "same_network": "the machines reach each other directly",
    "gpu_ids": "which GPUs the ranks see",
    "fsdp_version": "2: torch's fully_shard, one DTensor per parameter",
    "fsdp_reshard_after_forward": "true: a block's parameters are let go after forward and gathered again in backward",
    "fsdp_auto_wrap_policy": "which modules are gathered as one unit",
    "fsdp_transformer_layer_cls_to_wrap": "the unit: one all-gather per block and pass",
    "zero_stage": "1: optimizer states are partitioned; 2: gradients too; 3: parameters too",
    "deepspeed_config_file": "DeepSpeed's own settings, taken whole",
    "gradient_accumulation_steps": "must agree with what data.global_batch and data.micro_batch make",
    "gradient_clipping": "must agree with optimizer.clip",
    "deepspeed_multinode_launcher": "how processes start on the other machines",
    "zero3_init_flag": "not used: the model is built whole on every rank and then partitioned",
}
"""What a key does here. A key that is not in this table is not used, and `explain` says so."""


def _explain(config: dict[str, Any], resolved: Resolved) -> list[tuple[str, str, str]]:
    lines = [
        ("distributed_type", str(config.get("distributed_type", "NO")), f"the strategy: {resolved.strategy}"),
        ("mixed_precision", str(config.get("mixed_precision", "no")), _precision_effect(resolved)),
    ]
    nested = ("fsdp_config", "deepspeed_config")
    flat = {key: value for key, value in config.items() if key not in nested}
    for section in nested:
        flat |= config.get(section) or {}
    for key, value in flat.items():
        if key not in ("distributed_type", "mixed_precision"):
            lines.append((key, str(value), EFFECTS.get(key, "ignored: Shardrun does not use it")))
    return lines


def _precision_effect(resolved: Resolved) -> str:
    if resolved.precision == "fp32":
        return "everything in float32"
    return {
        "fsdp": "float32 shards, gathered in bf16, gradients reduced in float32",
        "single": "float32 weights and gradients, matrix products in bf16 (autocast)",
        "ddp": "float32 weights and gradients, matrix products in bf16 (autocast)",
    }.get(resolved.strategy, "bf16 weights and gradients, float32 master weights in the optimizer's partition")
