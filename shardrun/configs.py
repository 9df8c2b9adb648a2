"""What an accelerate config file resolves to, read without accelerate and without torch, key by key.

`strategies.select` reads what accelerate exports to a launched process; this reads the file, for the verbs that plan
and explain. A test holds the two against each other.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strategies import catalogue
from strategies.config_values import positive, read_bounded, section, short

SECTIONS = ("fsdp_config", "deepspeed_config", "parallelism_config")


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


def resolve_config(path: Path) -> Resolved:
    """Read a config. Raises ValueError, in one sentence, where it is none or asks for what is not supported, and
    FileNotFoundError where there is no such file."""
    config = _read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no keys; an accelerate config has at least distributed_type and num_processes.")
    config = {str(key): value for key, value in config.items()}
    config |= {key: section(path, config, key) for key in SECTIONS}
    asked = next((folder for folder in catalogue.configs() if folder.claims(config)), None)
    if asked is None:
        raise ValueError(catalogue.no_such_type(path, config))
    strategy, engine = asked.written(path, config)
    precision = short(config.get("mixed_precision", "no")).lower()
    if precision not in ("no", "false", "bf16"):
        raise ValueError(f"{path}: mixed_precision {precision} is not supported; write 'no' or bf16.")
    resolved = Resolved(
        path=path,
        strategy=strategy,
        world_size=positive(path, "num_processes", config.get("num_processes", 1)),
        precision="bf16" if precision == "bf16" else "fp32",
        cpu=bool(config.get("use_cpu")),
        engine=engine,
    )
    resolved.lines.extend(_explain(config, resolved, asked.EFFECTS))
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
        return yaml.load(read_bounded(path), Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:  # YAML's own types raise the last two
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not YAML: {why}.") from error


EFFECTS = {
    "use_cpu": "runs on CPU over gloo; without it, on GPUs over NCCL",
    "num_processes": "ranks in all; the global batch is divided over them",
    "num_machines": "machines; num_processes counts the ranks of all of them",
    "machine_rank": "which machine this is",
    "main_process_ip": "where rank 0 is",
    "main_process_port": "where the ranks meet; 0 is any free port",
    "same_network": "the machines reach each other directly",
    "gpu_ids": "which GPUs the ranks see",
    "mpirun_config": "quiet: true is accelerate launch --quiet: no traceback of its own after a run's last word",
}
"""What a key of any config does here. Those of a strategy stand in its config.py; any other key is not used, and
`explain` says so.
"""


def _explain(config: dict[str, Any], resolved: Resolved, of_strategy: dict[str, str]) -> list[tuple[str, str, str]]:
    """of_strategy: what the keys of its own sections do."""
    lines = [
        ("distributed_type", short(config.get("distributed_type", "NO")), f"the strategy: {resolved.strategy}"),
        ("mixed_precision", short(config.get("mixed_precision", "no")), _precision_effect(resolved)),
    ]
    effects = EFFECTS | of_strategy  # another strategy's keys do nothing here
    flat = {key: value for key, value in config.items() if key not in SECTIONS}
    for name in SECTIONS:
        flat |= config[name]
    for key, value in flat.items():
        if key not in ("distributed_type", "mixed_precision"):
            lines.append((key, short(value), effects.get(key, "ignored: Shardrun does not use it")))
    return lines


def _precision_effect(resolved: Resolved) -> str:
    if resolved.precision == "fp32":
        return "everything in float32"
    return catalogue.books(resolved.strategy).precision_in_words
