"""What an accelerate config file resolves to, read without accelerate and without torch, key by key.

`strategies.select` reads what accelerate exports to a launched process; this reads the file, for the verbs that plan
and explain. A test holds the two against each other.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTIONS = ("fsdp_config", "deepspeed_config")

MAX_BYTES = 2**16
"""A config file larger than this is not one."""

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
    """Read a config. Raises ValueError, in one sentence, where it is none or asks for what is not supported, and
    FileNotFoundError where there is no such file."""
    config = _read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no keys; an accelerate config has at least distributed_type and num_processes.")
    config = {str(key): value for key, value in config.items()}
    config |= {key: _section(path, config, key) for key in SECTIONS}
    kind = _short(config.get("distributed_type", "NO"))
    if kind not in DISTRIBUTED:
        hint = " (on CPU too: MULTI_GPU with use_cpu: true)" if kind == "MULTI_CPU" else ""
        raise ValueError(
            f"{path}: distributed_type {kind} is not supported; write one of {', '.join(DISTRIBUTED)}{hint}."
        )
    strategy, engine = DISTRIBUTED[kind], {}
    if strategy == "fsdp":
        engine = _fsdp(path, config["fsdp_config"])
    if strategy == "zero":
        engine = _deepspeed(path, config["deepspeed_config"])
        strategy = f"zero{engine['zero_optimization']['stage']}"
    precision = _short(config.get("mixed_precision", "no")).lower()
    if precision not in ("no", "false", "bf16"):
        raise ValueError(f"{path}: mixed_precision {precision} is not supported; write 'no' or bf16.")
    resolved = Resolved(
        path=path,
        strategy=strategy,
        world_size=_positive(path, "num_processes", config.get("num_processes", 1)),
        precision="bf16" if precision == "bf16" else "fp32",
        cpu=bool(config.get("use_cpu")),
        engine=engine,
    )
    resolved.lines.extend(_explain(config, resolved))
    return resolved


def _read_yaml(path: Path) -> Any:
    """What the file holds. A config comes from anywhere: it is refused before it can take memory or time."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Without aliases: a few lines of them can stand for gigabytes, and no accelerate config has any."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it uses an alias (*name)")
            return super().compose_node(parent, index)

    try:
        return yaml.load(_read_bounded(path), Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:  # YAML's own types raise the last two
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not YAML: {why}.") from error


def _read_bounded(path: Path) -> str:
    """A file's text. Raises FileNotFoundError, and ValueError where it is no text or too large for a config."""
    if not path.exists():
        raise FileNotFoundError(f"there is no config {path}.")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name the config itself.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a config has a few hundred, and {MAX_BYTES:,} at most are read.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error.reason} at byte {error.start}.") from error


def _section(path: Path, config: dict[str, Any], key: str) -> dict[str, Any]:
    """A nested section, empty where the file has none."""
    section = config.get(key) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {key} is {_short(section)}, not a section with keys of its own.")
    return {str(name): value for name, value in section.items()}


def _positive(path: Path, key: str, value: Any) -> int:
    """A count from 1 on, as a number or, as accelerate takes it too, as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 10**9:
        raise ValueError(f"{path}: {key} is {_short(value)}; write a whole number from 1 on.")
    return value


def _short(value: Any) -> str:
    try:
        text = " ".join(str(value).split())
    except ValueError:  # an integer with more digits than Python prints
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fsdp(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Keys with or without the fsdp_ prefix, as accelerate takes them."""
    config = {key.removeprefix("fsdp_"): value for key, value in config.items()}
    if str(version := _short(config.get("version", 1))) != "2":
        raise ValueError(f"{path}: fsdp_version {version} is not supported; write fsdp_version: 2.")
    wrap = config.get("transformer_layer_cls_to_wrap", "Block")
    if not isinstance(wrap, str):
        raise ValueError(f"{path}: fsdp_transformer_layer_cls_to_wrap is {_short(wrap)}; write names, such as Block.")
    policy = _short(config.get("auto_wrap_policy", "NO_WRAP")).upper()
    return {
        "reshard_after_forward": _short(config.get("reshard_after_forward", True)).lower() == "true",
        "wrap": [name.strip() for name in wrap.split(",")] if policy == "TRANSFORMER_BASED_WRAP" else [],
    }


def _deepspeed(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """accelerate's own keys, or the DeepSpeed JSON file that they name."""
    if file := config.get("deepspeed_config_file"):
        if not isinstance(file, str):
            raise ValueError(f"{path}: deepspeed_config_file is {_short(file)}; write the path of a JSON file.")
        try:
            engine = json.loads(_read_bounded(Path(file)))
        except (OSError, RecursionError, ValueError) as error:
            why = str(error).rstrip(".")
            raise ValueError(f"{path}: deepspeed_config_file {_short(file)} cannot be read: {why}.") from error
        if not isinstance(engine, dict):
            raise ValueError(
                f"{path}: deepspeed_config_file {_short(file)} holds {_short(engine)}, not DeepSpeed's settings."
            )
    else:
        engine = {"zero_optimization": {"stage": config.get("zero_stage", 2)}}
        engine |= {key: config[key] for key in ("gradient_accumulation_steps", "gradient_clipping") if key in config}
    stage = _section(path, engine, "zero_optimization").get("stage")
    if isinstance(stage, bool) or not isinstance(stage, int) or stage not in (1, 2, 3):
        raise ValueError(
            f"{path}: zero_stage {_short(stage)} is not supported; write 1, 2 or 3 (0 is plain DDP: ddp.yaml)."
        )
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
    "mpirun_config": "quiet: true is accelerate launch --quiet: no traceback of its own after a run's last word",
    "deepspeed_multinode_launcher": "how processes start on the other machines",
    "zero3_init_flag": "not used: the model is built whole on every rank and then partitioned",
}
"""What a key does here. A key that is not in this table is not used, and `explain` says so."""


def _explain(config: dict[str, Any], resolved: Resolved) -> list[tuple[str, str, str]]:
    lines = [
        ("distributed_type", _short(config.get("distributed_type", "NO")), f"the strategy: {resolved.strategy}"),
        ("mixed_precision", _short(config.get("mixed_precision", "no")), _precision_effect(resolved)),
    ]
    flat = {key: value for key, value in config.items() if key not in SECTIONS}
    for section in SECTIONS:
        flat |= config[section]
    for key, value in flat.items():
        if key not in ("distributed_type", "mixed_precision"):
            lines.append((key, _short(value), EFFECTS.get(key, "ignored: Shardrun does not use it")))
    return lines


def _precision_effect(resolved: Resolved) -> str:
    if resolved.precision == "fp32":
        return "everything in float32"
    return {
        "fsdp": "float32 shards, gathered in bf16, gradients reduced in float32",
        "single": "float32 weights and gradients, matrix products in bf16 (autocast)",
        "ddp": "float32 weights and gradients, matrix products in bf16 (autocast)",
    }.get(resolved.strategy, "bf16 weights and gradients, float32 master weights in the optimizer's partition")
