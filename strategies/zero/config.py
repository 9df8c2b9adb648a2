"""What an accelerate config file says of ZeRO: `distributed_type: DEEPSPEED` and its section, or DeepSpeed's own JSON,
whose keys stand in json_keys.py. Plain Python, no torch.

What comes out is DeepSpeed's settings under canonical names, each value of its type: nothing is passed on unread.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from strategies.config_file import read_mapping
from strategies.config_keys import COMMAND_LINE, Key, Request, Resolution, Said, idle, refused, used
from strategies.config_values import ConfigError, choice, not_enabled, number, short, truth, whole
from strategies.zero import json_keys, settings
from strategies.zero.offload import Refusal, refusals

DISTRIBUTED_TYPE = "DEEPSPEED"

LAUNCHERS = ("pdsh", "standard", "openmpi", "mvapich", "mpich", "nossh", "slurm", "impi")

SECTION = "deepspeed_config"
"""Its section of a config file, if it has one."""


def _unless_auto(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A value that accelerate may leave open."""
    return lambda value: None if value == "auto" else read(value)


def _file(value: Any) -> str | None:
    if not isinstance(value, str):
        raise ConfigError("write the path of a JSON file")
    return None if value == "none" else value


KEYS: dict[str, Key] = {
    "zero_stage": used("1: optimizer states are partitioned; 2: gradients too; 3: parameters too", whole(0, 3)),
    "deepspeed_config_file": used("DeepSpeed's own settings, key by key below", _file),
    "gradient_accumulation_steps": used("micro-batches of a step", _unless_auto(whole())),
    "gradient_clipping": used(
        "the global norm above which gradients are scaled down; 0: never", _unless_auto(number())
    ),
    "offload_optimizer_device": used("where master weights and optimizer states lie", choice("none", "cpu", "nvme")),
    "offload_param_device": used("where the parameters lie", choice("none", "cpu", "nvme")),
    "offload_optimizer_nvme_path": used("the folder on NVMe"),
    "offload_param_nvme_path": used("the folder on NVMe"),
    "deepspeed_multinode_launcher": used("how processes start on the other machines", choice(*LAUNCHERS)),
    "deepspeed_hostfile": used("the machines, for launchers other than standard"),
    "deepspeed_exclusion_filter": used("machines and GPUs that are left out, for launchers other than standard"),
    "deepspeed_inclusion_filter": used("machines and GPUs that are taken, for launchers other than standard"),
    "deepspeed_moe_layer_cls_names": refused("remove it: the model has no experts"),
    "zero3_init_flag": idle("stage 3 cuts each parameter as soon as it has memory, in any case", truth),
    "zero3_save_16bit_model": idle("checkpoints have a form of their own, the same for every strategy"),
}
"""Key of its section → what it does."""

IN_JSON = (
    *("gradient_accumulation_steps", "gradient_clipping", "zero_stage", "offload_optimizer_device"),
    *("offload_param_device", "offload_param_nvme_path", "offload_optimizer_nvme_path", "zero3_save_16bit_model"),
    "mixed_precision",
)
"""What accelerate refuses in a config file beside deepspeed_config_file (`_deepspeed_config_checks`)."""


def claims(config: Request) -> bool:
    """Whether a config asks for this."""
    return config.get("distributed_type") == DISTRIBUTED_TYPE


def resolve(config: Request) -> Resolution:
    """What a config that this claims asks for. Raises ConfigError for what is not supported."""
    config.refuse_axes()
    if config.get("deepspeed_config_file"):
        return _of_json(config)
    zero: dict[str, Any] = {"stage": _stage(config, "zero_stage")}
    for part in ("offload_optimizer", "offload_param"):
        device = config.get(f"{part}_device", "none")
        if device != "none":
            zero[part] = {"device": device}
            if device == "nvme" and (path := config.get(f"{part}_nvme_path", "none")) != "none":
                zero[part]["nvme_path"] = path
    where = {
        f"zero_optimization.{part}.device": config.said.get(f"{part}_device")
        for part in ("offload_optimizer", "offload_param")
    }
    asks = {
        name: Said(config.said[key].name, config.values[key], config.said[key].where)
        for name, key in (("clip", "gradient_clipping"), ("accumulation", "gradient_accumulation_steps"))
        if config.get(key) is not None
    }
    precision = config.precision
    engine = {"zero_optimization": zero}
    _check(config, engine, precision, {key: said for key, said in where.items() if said})
    _check_fp16(config, precision == "fp16", config.said.get("mixed_precision"))
    return Resolution(f"zero{zero['stage']}", engine, asks=asks)


def look_here(cpu: bool) -> None:
    """Import DeepSpeed: before accelerate does, which is noisier. Raises ValueError where it is not installed."""
    import torch

    from strategies.zero.engine import import_deepspeed

    import_deepspeed(torch.device("cpu" if cpu else "cuda"))


def _of_json(config: Request) -> Resolution:
    """As `resolve`, where DeepSpeed's own file says it."""
    file = config.said["deepspeed_config_file"]
    for key in IN_JSON:
        if key in config.said and config.said[key].where != COMMAND_LINE and config.said[key].value is not None:
            raise config.refusal(key, f"remove it: deepspeed_config_file {short(file.value)} says it")
    path = Path(file.value)
    try:
        there = path.is_file()
    except OSError:  # a name too long to be one
        there = False
    if not there:
        raise file.refusal("there is no such file: write the path of a JSON file, from where accelerate launch starts")
    try:
        content, written = json_keys.canonical(read_mapping(path))
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(str(path)) else f"{path}: {text.rstrip('.')}.") from error
    if "zero_optimization" in content and not isinstance(content["zero_optimization"], dict):
        here = Said("zero_optimization", content["zero_optimization"], str(path))
        raise here.refusal('write a section: "zero_optimization": {"stage": 2}')
    if "zero_optimization" not in content:
        raise ConfigError(f'{path}: it has no section zero_optimization; write "zero_optimization": {{"stage": 2}}.')
    said, engine, lines = _read(path, content, written)
    stage = said.get("zero_optimization.stage")
    if stage is None or stage.value is None:
        raise ConfigError(f"{path}: zero_optimization.stage is missing, and 0 is plain DDP; write 1, 2 or 3.")
    if stage.value == "auto":
        engine["zero_optimization"]["stage"] = _stage(config, "zero_stage")
    elif engine["zero_optimization"]["stage"] == 0:
        raise stage.refusal("write 1, 2 or 3, or use ddp.yaml, which is what stage 0 is")
    for key, dotted in (
        ("gradient_clipping",) * 2,
        ("gradient_accumulation_steps",) * 2,
        ("zero_stage", "zero_optimization.stage"),
    ):
        if key in config.values and dotted in said and said[dotted].value != "auto":
            theirs = engine.get(dotted, engine["zero_optimization"].get("stage"))
            if config.values[key] != theirs:
                raise config.refusal(key, f"{path} says {dotted} {short(said[dotted].value)}: remove one")
    asks = {
        name: Said(key, engine.pop(key), str(path))
        for name, key in (("clip", "gradient_clipping"), ("accumulation", "gradient_accumulation_steps"))
        if key in engine
    }
    for name, key in (("global_batch", "train_batch_size"), ("micro_batch", "train_micro_batch_size_per_gpu")):
        if key in engine:
            asks[name] = Said(key, engine.pop(key), str(path))
    _check_sizes(asks, config.get("num_processes", 1))
    checkpoints = said.get("activation_checkpointing.number_checkpoints")
    if engine.pop("activation_checkpointing", {}).get("number_checkpoints") and checkpoints:
        asks["checkpointing"] = Said(checkpoints.name, "block", str(path), checkpoints.value)
    _take_offload(config, engine, said, path)
    precision = _precision(config, engine, said)
    _check(config, engine, precision, said)
    lines = _of_this_run(lines, said, engine, precision)
    for section in ("bf16", "fp16"):
        engine.get(section, {}).pop("enabled", None)
        if not engine.get(section):
            engine.pop(section, None)
    return Resolution(f"zero{engine['zero_optimization']['stage']}", engine, precision, asks, lines)


def _read(
    path: Path, content: dict[str, Any], written: dict[str, tuple[str, Any]]
) -> tuple[dict[str, Said], dict[str, Any], list[tuple[str, str, str]]]:
    """Every key by its entry: as it was said, what is passed on to DeepSpeed, and a line about each."""
    said: dict[str, Said] = {}
    engine: dict[str, Any] = {"zero_optimization": {}}
    lines = []
    for name, value, wrong in json_keys.parts(content):
        here = said[name] = Said(*written.get(name, (name, value)), str(path))
        if wrong:
            raise here.refusal(wrong)
        if any(name == key or name.startswith(f"{key}.") for key in json_keys.REMOVED):
            raise here.refusal("remove it: DeepSpeed has it no more")
        if value in ({}, None) and name in json_keys.SECTIONS and name not in json_keys.KEYS:
            lines.append((here.name, short(value), "asks for nothing"))
            continue
        found = json_keys.entry(name)
        if found is None:
            raise here.refusal("DeepSpeed reads no such key: remove it, or check its spelling and its section")
        owner, entry = found
        effect = {"used": entry.text, "refused": "asks for nothing, as it must here"}.get(entry.kind)
        lines.append((here.name, short(here.value), effect or f"without effect: {entry.text}"))
        # A section with a switch is judged by it, whatever else stands beside it.
        judged = content.get(owner) if entry.says_nothing is not_enabled else value
        if entry.kind == "refused" and not entry.says_nothing(judged):
            raise here.refusal(entry.text)
        if entry.kind != "used" or value is None or value == "auto" or value == {}:
            continue
        if isinstance(value, dict):
            raise here.refusal("write one value")
        try:
            taken = entry.read(value)
        except ConfigError as error:
            raise here.refusal(str(error)) from error
        place = engine
        *sections, last = name.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = taken
    return said, engine, lines


def _take_offload(config: Request, engine: dict[str, Any], said: dict[str, Said], path: Path) -> None:
    """What the command line says of offload fills an "auto" of the file, and may not contradict it."""
    for part in ("offload_optimizer", "offload_param"):
        device, name = config.get(f"{part}_device"), f"zero_optimization.{part}.device"
        if device is None:
            continue
        section = engine["zero_optimization"].setdefault(part, {})
        if name in said and said[name].value == "auto":
            section["device"] = device
        elif section.get("device", "none") != device:
            raise config.refusal(f"{part}_device", f"write it in {path}, which says all of DeepSpeed's settings")


def _of_this_run(
    lines: list[tuple[str, str, str]], said: dict[str, Said], engine: dict[str, Any], precision: str
) -> list[tuple[str, str, str]]:
    """The lines with what depends on the stage and the precision."""
    stage = engine["zero_optimization"]["stage"]
    unknown = set(settings.unpredicted(stage, precision, engine).values())
    found = []
    for (key, value, effect), name in zip(lines, said, strict=True):
        section = name.partition(".")[0]
        if any(name == key or name.startswith(f"{key}.") for key in unknown):
            effect += "; trains, and what it changes in the books is not predicted"
        elif stage < 3 and name in json_keys.STAGE_3:
            effect = "without effect: only read in stage 3"
        elif section in ("bf16", "fp16") and section != precision and name != f"{section}.enabled":
            effect = f"without effect: {section} is off"
        found.append((key, value, effect))
    return found


def _check_sizes(asks: dict[str, Said], ranks: int) -> None:
    """Raises ConfigError where no batch can have these sizes."""
    sizes = {name: asks[name].value for name in ("global_batch", "micro_batch", "accumulation") if name in asks}
    least = ranks * sizes.get("micro_batch", 1) * sizes.get("accumulation", 1)
    whole_batch = sizes.get("global_batch", least)
    if whole_batch % least or (len(sizes) == 3 and whole_batch != least):
        instead = f'write the product of micro-batch, accumulation and {ranks} ranks, or "auto"'
        raise asks["global_batch"].refusal(instead)


def _stage(config: Request, key: str) -> int:
    stage = config.get(key, 2)  # accelerate's default
    if stage == 0:
        raise config.refusal(key, "write 1, 2 or 3, or use ddp.yaml, which is what stage 0 is")
    return int(stage)


def _check(request: Request, engine: dict[str, Any], precision: str, said: dict[str, Said]) -> None:
    """What DeepSpeed cannot do. engine: as taken; said: who said what of it, by dotted name. Raises ConfigError."""
    zero = engine["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device", "none") == "none":
            zero.pop(part, None)  # pin_memory and the like say nothing alone
    found = [*refusals(engine, precision)]
    ranks, cpu = request.get("num_processes", 1), request.get("use_cpu", False)
    if other := settings.zero_refusal(zero["stage"], precision, engine, ranks, cpu):
        found.append(Refusal(other[0], settings.value(engine, other[0]), other[1]))
    for key, value, why in found:
        raise (said.get(key) or Said(key, value, request.shown)).refusal(why)


def _precision(config: Request, engine: dict[str, Any], said: dict[str, Said]) -> str:
    """What DeepSpeed's file says, "auto" being what the command line says. Raises ConfigError where they contradict."""
    asked = "no" if config.precision == "fp32" else config.precision
    enabled = {}
    for name in ("bf16", "fp16"):
        here = said.get(f"{name}.enabled")
        enabled[name] = (
            asked == name if here is None or here.value == "auto" else bool(engine.get(name, {}).get("enabled"))
        )
        if here is not None and asked == name and not enabled[name]:
            raise config.refusal("mixed_precision", f"{here} says otherwise: remove one")
    both = [name for name, on in enabled.items() if on]
    if len(both) > 1:
        if asked in both and said.get(f"{asked}.enabled") is None:
            raise config.refusal(
                "mixed_precision",
                f"{said[f'{next(n for n in both if n != asked)}.enabled']} says otherwise: remove one",
            )
        raise said["fp16.enabled"].refusal("bf16.enabled is on too: remove one")
    if both and asked == "no" and "mixed_precision" in config.said:
        raise config.refusal("mixed_precision", f"{said[f'{both[0]}.enabled']} says otherwise: remove one")
    if not both:
        return "fp32"
    if asked not in ("no", both[0]):
        raise config.refusal("mixed_precision", f"{said[f'{both[0]}.enabled']} says otherwise: remove one")
    _check_fp16(config, both == ["fp16"], said.get("fp16.enabled") or config.said.get("mixed_precision"))
    return both[0]


def _check_fp16(config: Request, on: bool, said: Said | None) -> None:
    if on and config.get("use_cpu"):
        why = "DeepSpeed computes in fp16 on GPUs alone: write bf16, or use ddp.yaml or fsdp.yaml"
        raise (said or config.said["fp16"]).refusal(why)
