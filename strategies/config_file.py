"""The one reader of what a launch was asked for: the accelerate config file as written, and what was said beside it.

`shardrun explain`, `diff`, `plan`, `certify` and `doctor` read a file through it, and so does the launch itself, which
adds accelerate's command line and environment (strategies/select.py). So they cannot differ. It imports neither
accelerate nor torch. Where accelerate's own launcher would stumble, it refuses in a sentence.

Every key has an entry: strategies/config_keys.py has those of all configs, a strategy's config.py those of its own
sections. A key without an entry is refused.
"""

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies import catalogue
from strategies.config_keys import (
    COMMAND_LINE,
    DYNAMO,
    ENVIRONMENT,
    FIRST,
    FOREIGN,
    MPIRUN,
    PARALLELISM,
    SECTIONS,
    TOP,
    Key,
    Request,
    Said,
)
from strategies.config_values import ConfigError, number, read_bounded, short, whole

NEVER_NULL = ("use_cpu", "num_processes", "num_machines")
"""Keys for which accelerate takes no null."""

BY_ALL = ("gradient_clipping", "gradient_accumulation_steps")
"""Options of accelerate launch that every strategy takes."""


@dataclass(frozen=True)
class Asked:
    """What a launch was asked for."""

    path: Path | None
    strategy: str
    world_size: int
    precision: str
    cpu: bool
    engine: dict[str, Any]
    asks: dict[str, Said]
    """What it asks of the trainer: clip, accumulation, checkpointing, compile, global_batch, micro_batch. A value each,
    and where it is said."""
    lines: list[tuple[str, str, str]]
    """Key by key: key, value as written, what it does here."""


def asked(path: Path | None, beside: Mapping[str, Said] | None = None, ranks: int | None = None) -> Asked:
    """Read a config file, or nothing, and what was said beside it, which comes first.

    ranks: the processes that were started, where nobody says how many to start.

    Raises ConfigError, in one sentence, where something is not supported, and FileNotFoundError.
    """
    shown = str(path) if path else COMMAND_LINE
    config = Request(shown, {**(of_file(path) if path else {}), **(beside or {})})
    for key in FIRST:
        if key in config.said:
            _line(
                config,
                key,
                {**TOP, **{name: entry for folder in catalogue.configs() for name, entry in folder.KEYS.items()}},
            )
    if "distributed_type" not in config.said:
        raise ConfigError(
            f"{shown}: distributed_type is missing; write one of {', '.join(catalogue.distributed_types())}."
        )
    folder = _claimed(config)
    if "num_processes" not in config.said and ranks is not None:
        config.values["num_processes"] = ranks
    entries = _entries(folder)
    lines = [_line(config, key, entries) for key in config.said]
    _check_launcher(config)
    if "num_processes" not in config.values and config.said["distributed_type"].value != "NO":
        raise ConfigError(f"{shown}: num_processes is missing; write how many ranks there are.")
    resolution = folder.resolve(config)
    precision = resolution.precision or config.precision
    asks = _asks(config) | resolution.asks
    if "compile" in asks and (why := catalogue.books(resolution.strategy).refuses_compile):
        raise config.refusal("dynamo_backend", why)
    effects = {
        "distributed_type": f"the strategy: {resolution.strategy}",
        "mixed_precision": "everything in float32" if precision == "fp32" else _in_words(resolution.strategy),
    }
    return Asked(
        path=path,
        strategy=resolution.strategy,
        world_size=config.get("num_processes", 1),
        precision=precision,
        cpu=config.get("use_cpu", False),
        engine=resolution.engine,
        asks=asks,
        lines=[
            (key, value, effects.get(key, effect))
            for key, value, effect in lines
            if config.said[key].value is not None or key not in {name for name, _, _ in resolution.lines}
        ]
        + resolution.lines,
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file (by its name, as accelerate goes) holds. Raises ConfigError where that is no mapping.

    It is refused before it can take memory or time: a config comes from anywhere.
    """
    text = read_bounded(path)
    try:
        found = json.loads(text, object_pairs_hook=_no_twins) if path.suffix == ".json" else _yaml(text)
    except json.JSONDecodeError as error:
        if text.startswith("\ufeff"):
            raise ConfigError(f"{path} begins with a byte order mark: save it as UTF-8 without one.") from error
        raise ConfigError(f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.") from error
    except (RecursionError, ValueError, TypeError) as error:  # YAML's own types raise the last two
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(f"{path} is not {'JSON' if path.suffix == '.json' else 'YAML'}: {why}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {short(found)}, not keys and values.")
    return {str(key): value for key, value in found.items()}


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{short(twin)} is written twice")
    return found


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Without aliases: a few lines of them can stand for gigabytes, and no accelerate config has any."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ConfigError("it uses an alias (*name)")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [name.value for name, _ in node.value if isinstance(name.value, str)]
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"{short(name)} is written twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{error.problem}{mark}") from error
    except yaml.YAMLError as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def of_file(path: Path) -> dict[str, Said]:
    """Every key of a file by accelerate's name for it. Raises ConfigError for a section that is none."""
    found: dict[str, Said] = {}
    for name, value in read_mapping(path).items():
        if name not in SECTIONS:
            home = next((section for section, keys in _homes().items() if name in keys and name not in TOP), None)
            if home:
                raise Said(name, value, str(path)).refusal(f"write it inside {home}, where accelerate reads it")
            _say(found, name, Said(name, value, str(path)))
            continue
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{path}: {name} is {short(value)}, not a section with keys of its own.")
        prefix = SECTIONS[name]
        for key, part in (value or {}).items():
            flat = str(key) if str(key).startswith(prefix.rstrip("_")) else prefix + str(key)
            _say(found, flat, Said(str(key), part, str(path)))
    return found


def _homes() -> dict[str, Collection[str]]:
    """Section of a file → the keys that belong into it."""
    theirs = {folder.SECTION: folder.KEYS for folder in catalogue.configs() if folder.SECTION}
    return {**theirs, "dynamo_config": DYNAMO, "parallelism_config": PARALLELISM}


def _say(found: dict[str, Said], key: str, said: Said) -> None:
    if key in found:
        raise ConfigError(f"{said.where}: {key} is written twice, as {found[key].name} and {said.name}; remove one.")
    found[key] = said


def _claimed(config: Request) -> Any:
    """The config.py of the folder whose strategy is asked for. Raises ConfigError where there is none."""
    said = config.said["distributed_type"]
    kind = "NO" if said.value is False else said.value  # YAML reads a bare NO as false, and accelerate takes that
    config.values["distributed_type"] = kind
    folder = next((folder for folder in catalogue.configs() if folder.claims(config)), None)
    if folder is None:
        hint = " (on CPU too: MULTI_GPU with use_cpu: true)" if kind == "MULTI_CPU" else ""
        raise said.refusal(f"write one of {', '.join(catalogue.distributed_types())}{hint}")
    return folder


def _entries(folder: Any) -> dict[str, Key]:
    """Key → what it does, under the strategy of a folder. Sections that another one reads are known, without effect."""
    entries: dict[str, Key] = {}
    for other in catalogue.configs():
        why = f"only read with distributed_type {other.DISTRIBUTED_TYPE}"
        entries |= {key: Key("without effect", why) for key in other.KEYS}
    return {**entries, **DYNAMO, **PARALLELISM, **MPIRUN, **TOP, **folder.KEYS}


def _line(config: Request, key: str, entries: Mapping[str, Key]) -> tuple[str, str, str]:
    """Coerce a key's value into `config.values` and say what it does. Raises ConfigError where it cannot be taken."""
    said = config.said[key]
    entry = entries.get(key)
    if entry is None:
        foreign = next((why for name, why in FOREIGN.items() if key.startswith(name.removesuffix("config"))), None)
        if foreign and said.where == COMMAND_LINE:
            raise ConfigError(f"{said} is {foreign}, which is not supported; remove it.")
        if foreign:
            return key, short(said.value), f"without effect: {foreign}"
        near = [name for name in entries if name.endswith(f"_{key}")] or difflib.get_close_matches(key, entries, 1)
        raise said.refusal(f"there is no such key: {f'write {near[0]}' if near else 'remove it'}")
    if entry.kind != "refused" and key != "distributed_type":
        if said.value is not None or key in NEVER_NULL:
            try:
                config.values[key] = entry.read(said.value)
            except ConfigError as error:
                raise said.refusal(str(error)) from error
    if entry.kind == "without effect":
        if said.where == COMMAND_LINE and entry.text.startswith("only read with") and key not in BY_ALL:
            raise ConfigError(f"{said} is {entry.text}; remove it, or launch another config.")
        return key, short(said.value), f"without effect: {entry.text}"
    if entry.kind == "refused":
        if not entry.says_nothing(said.value):
            raise said.refusal(entry.text)
        return key, short(said.value), "asks for nothing, as it must here"
    return key, short(said.value), entry.text


def _check_launcher(config: Request) -> None:
    """What accelerate's own launcher cannot start."""
    said, kind = config.said, config.get("distributed_type")
    ids = config.get("gpu_ids", "all")
    machines = config.get("num_machines", 1)
    if kind == "MULTI_GPU" and ids != "all" and "," not in ids and machines == 1:
        raise config.refusal("gpu_ids", "accelerate launch wants two ids or more with MULTI_GPU: write all of them")
    if config.get("use_cpu") and isinstance(said.get("num_processes", Said("", 1, "")).value, str):
        raise config.refusal("num_processes", "write the number without quotes: accelerate launch compares it on a CPU")
    if machines > 1:
        if "main_process_ip" not in config.values:
            raise config.refusal("num_machines", "say in main_process_ip where the first machine is")
        if config.get("num_processes", machines) % machines:
            raise config.refusal("num_processes", f"write a multiple of num_machines, which is {machines}")
    if config.get("machine_rank", 0) >= machines:
        raise config.refusal("machine_rank", f"write 0 to {machines - 1}: num_machines is {machines}")
    if config.get("fp16") and "mixed_precision" in said and config.get("mixed_precision") != "fp16":
        raise config.refusal("fp16", "remove it: mixed_precision says the precision")


def _in_words(strategy: str) -> str:
    return catalogue.books(strategy).precision_in_words


def _asks(config: Request) -> dict[str, Said]:
    """What any config may ask of the trainer."""
    found: dict[str, Said] = {}
    if config.get("dynamo_backend") == "INDUCTOR":
        dynamo = config.said["dynamo_backend"]
        found["compile"] = Said(dynamo.name, True, dynamo.where, dynamo.value)
    for key, name, read in (
        ("gradient_clipping", "clip", number()),
        ("gradient_accumulation_steps", "accumulation", whole()),
    ):
        said = config.said.get(key)
        if said and said.where in (COMMAND_LINE, ENVIRONMENT) and said.value not in (None, "auto"):
            try:
                found[name] = Said(said.name, read(said.value), said.where)
            except ConfigError as error:
                raise said.refusal(str(error)) from error
    return found
