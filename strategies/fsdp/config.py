"""What an accelerate config file says of FSDP2: `distributed_type: FSDP` and its section; and of HSDP, which has a
`parallelism_config` of several replicas beside it. Plain Python, no torch: what accelerate exported, its own plugin
parses, which is imported where that is asked for.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strategies.config_values import flag, positive, short

DISTRIBUTED_TYPE = "FSDP"
SECTION, PREFIX = "parallelism_config", "PARALLELISM_CONFIG_"

EFFECTS = {
    "fsdp_version": "2: torch's fully_shard, one DTensor per parameter",
    "fsdp_reshard_after_forward": "true: a block's parameters are let go after forward and gathered again in backward",
    "fsdp_auto_wrap_policy": "which modules are gathered as one unit",
    "fsdp_transformer_layer_cls_to_wrap": "the unit: one all-gather per block and pass",
    "parallelism_config_dp_replicate_size": "replicas, each of which holds everything once",
    "parallelism_config_dp_shard_size": "ranks of a replica, over which everything is sharded",
}
"""Key of a config → what it does here."""


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config file, as read, asks for this."""
    return short(config.get("distributed_type")) == DISTRIBUTED_TYPE


def written(path: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The strategy's name and its engine's settings, out of a config file that this claims.

    Keys with or without the fsdp_ prefix, as accelerate takes them. Raises ValueError for what is not supported.
    """
    section = {key.removeprefix("fsdp_"): value for key, value in config["fsdp_config"].items()}
    if str(version := short(section.get("version", 1))) != "2":
        raise ValueError(f"{path}: fsdp_version {version} is not supported; write fsdp_version: 2.")
    wrap = section.get("transformer_layer_cls_to_wrap", "Block")
    if not isinstance(wrap, str):
        raise ValueError(f"{path}: fsdp_transformer_layer_cls_to_wrap is {short(wrap)}; write names, such as Block.")
    policy = short(section.get("auto_wrap_policy", "NO_WRAP")).upper()
    engine = {
        "reshard_after_forward": short(section.get("reshard_after_forward", True)).lower() == "true",
        "wrap": [name.strip() for name in wrap.split(",")] if policy == "TRANSFORMER_BASED_WRAP" else [],
    }
    sizes = {key.removeprefix(PREFIX.lower()): value for key, value in config.get(SECTION, {}).items()}
    return _on_axes(str(path), engine, sizes, positive(path, "num_processes", config.get("num_processes", 1)))


def launched(environ: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Whether what `accelerate launch` exported to this process, or the file that it read, asks for this."""
    return flag(environ, "ACCELERATE_USE_FSDP")


def exported(shown: str, cpu: bool) -> tuple[str, dict[str, Any]]:
    """As `written`, out of what `accelerate launch` exported. shown: the config's name, for errors."""
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"{shown}: fsdp_version {version} is not supported; write fsdp_version: 2 (fully_shard).")
    if flag(os.environ, "FSDP_OFFLOAD_PARAMS"):
        raise ValueError(f"{shown}: fsdp_offload_params true is not supported; remove it or write false.")
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    if policy == "SIZE_BASED_WRAP":
        raise ValueError(
            f"{shown}: fsdp_auto_wrap_policy SIZE_BASED_WRAP is not supported; write TRANSFORMER_BASED_WRAP "
            "with fsdp_transformer_layer_cls_to_wrap: Block."
        )
    from accelerate.utils import FullyShardedDataParallelPlugin

    # Not before SIZE_BASED_WRAP is refused: accelerate 1.10 cannot read what it exports for it.
    plugin = FullyShardedDataParallelPlugin()
    wrap = plugin.transformer_cls_names_to_wrap or ["Block"] if policy == "TRANSFORMER_BASED_WRAP" else []
    engine = {"reshard_after_forward": bool(plugin.reshard_after_forward), "wrap": list(wrap)}
    sizes = {}
    if flag(os.environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = {key.removeprefix(PREFIX).lower(): os.environ[key] for key in os.environ if key.startswith(PREFIX)}
    return _on_axes(shown, engine, sizes, int(os.environ.get("WORLD_SIZE", 1)))


def _on_axes(shown: str, engine: dict[str, Any], keys: Mapping[str, Any], ranks: int) -> tuple[str, dict[str, Any]]:
    """FSDP or HSDP, by the sizes of the mesh's axes. Raises ValueError for axes that are not supported, or that do not
    make the number of ranks.
    """
    sizes = {key: positive(shown, f"{SECTION}_{key}", value) for key, value in keys.items() if key.endswith("_size")}
    for axis, size in sizes.items():
        if size > 1 and axis not in ("dp_replicate_size", "dp_shard_size"):
            raise ValueError(f"{shown}: parallelism_config_{axis} {size} is not supported; remove it or write 1.")
    replicas, shards = sizes.get("dp_replicate_size", 1), sizes.get("dp_shard_size", 1)
    if replicas == shards == 1:
        return "fsdp", engine  # no mesh was asked for
    if replicas * shards != ranks:
        raise ValueError(
            f"{shown}: {replicas} replicas (parallelism_config_dp_replicate_size) of {shards} ranks "
            f"(parallelism_config_dp_shard_size) are {replicas * shards} ranks, but there are {ranks}; change one of "
            f"the two, for example --parallelism_config_dp_shard_size {max(ranks // replicas, 1)}."
        )
    if shards == 1:
        raise ValueError(f"{shown}: replicas of one rank each shard nothing; use ddp.yaml.")
    return ("hsdp", {**engine, "replicas": replicas}) if replicas > 1 else ("fsdp", engine)
