"""What an accelerate config file says of FSDP2: `distributed_type: FSDP` and its section; and of HSDP, which has a
`parallelism_config` of several replicas beside it. Plain Python, no torch.
"""

from typing import Any

from strategies.config_keys import Key, Request, Resolution, Said, idle, refused, used
from strategies.config_values import ConfigError, choice, nothing_said, truth
from strategies.fsdp.settings import fsdp_refusal

DISTRIBUTED_TYPE = "FSDP"

STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""fsdp_sharding_strategy of FSDP version 1, whose files number them from 1 on."""


def _version(value: Any) -> int:
    if str(value) != "2":
        raise ConfigError("write fsdp_version: 2, which is fully_shard")
    return 2


def _reshard(value: Any) -> bool | int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        return value
    if isinstance(value, str) and value.isdigit() and int(value) > 1:
        return int(value)
    try:
        return truth(value)
    except ConfigError:
        raise ConfigError("write true, false, or how many ranks hold a block once between its passes") from None


def _names(value: Any) -> list[str]:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise ConfigError("write names of classes, such as Block")
    return names


def _sharding(value: Any) -> str:
    word = str(value).strip().upper()
    if word.isdigit() and 1 <= int(word) <= len(STRATEGIES):
        return STRATEGIES[int(word) - 1]
    return choice(*STRATEGIES)(word)


SECTION = "fsdp_config"
"""Its section of a config file, if it has one."""

KEYS: dict[str, Key] = {
    "fsdp_version": used("2: torch's fully_shard, one DTensor per parameter", _version),
    "fsdp_reshard_after_forward": used(
        "true: a block's parameters are let go after forward and gathered again in backward; "
        "a number: they stay, cut over so many ranks",
        _reshard,
    ),
    "fsdp_auto_wrap_policy": used(
        "which modules are gathered as one unit", choice("NO_WRAP", "TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP")
    ),
    "fsdp_transformer_layer_cls_to_wrap": used("the unit: one all-gather per block and pass", _names),
    "fsdp_offload_params": used("true: parameters, gradients and optimizer states lie in host memory", truth),
    "fsdp_activation_checkpointing": used("true: as --model.checkpointing block", truth),
    "fsdp_activation_checkpointing_offload": refused("remove it: activations stay on their device"),
    "fsdp_sharding_strategy": used(
        "version 1's word for the same: SHARD_GRAD_OP lets go of nothing after forward", _sharding
    ),
    "fsdp_mixed_precision_policy": used("must agree with mixed_precision"),
    "fsdp_ignored_modules": refused("remove it: every parameter is sharded"),
    "fsdp_forward_prefetch": idle("FSDP2 gathers the next block ahead by itself"),
    "fsdp_min_num_params": idle("only read with SIZE_BASED_WRAP"),
    "fsdp_backward_prefetch": idle("FSDP2 always gathers the next block while this one is in backward"),
    "fsdp_backward_prefetch_policy": idle("FSDP2 always gathers the next block while this one is in backward"),
    "fsdp_state_dict_type": idle(
        "checkpoints have a form of their own, the same for every strategy",
        choice("FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT", "1", "2", "3"),
    ),
    "fsdp_state_dict_config": idle("checkpoints have a form of their own, the same for every strategy"),
    "fsdp_optim_state_dict_config": idle("checkpoints have a form of their own, the same for every strategy"),
    "fsdp_use_orig_params": idle("FSDP2 always has the original parameters"),
    "fsdp_sync_module_states": idle("every rank draws its own shards from the seed"),
    "fsdp_cpu_ram_efficient_loading": idle("no rank ever has the whole model: it draws its shards, or reads them"),
    "fsdp_limit_all_gathers": idle("FSDP2 never has more than two blocks gathered"),
}
"""Key of its section → what it does."""


def claims(config: Request) -> bool:
    """Whether a config asks for this."""
    return config.get("distributed_type") == DISTRIBUTED_TYPE


def resolve(config: Request) -> Resolution:
    """What a config that this claims asks for. Raises ConfigError for what is not supported."""
    if "fsdp_version" not in config.values:
        why = "without fsdp_version in fsdp_config accelerate takes version 1"
        raise ConfigError(f"{config.shown}: {why}, which is not supported; write fsdp_version: 2.")
    _check_launcher(config)
    policy = config.get("fsdp_auto_wrap_policy", "NO_WRAP")
    if policy == "SIZE_BASED_WRAP":
        instead = "write TRANSFORMER_BASED_WRAP with fsdp_transformer_layer_cls_to_wrap: Block"
        raise config.refusal("fsdp_auto_wrap_policy", instead)
    wrap = config.get("fsdp_transformer_layer_cls_to_wrap", ["Block"])
    if policy == "NO_WRAP" and "fsdp_transformer_layer_cls_to_wrap" in config.values:
        instead = "write fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, without which it is not read"
        raise config.refusal("fsdp_transformer_layer_cls_to_wrap", instead)
    engine: dict[str, Any] = {
        "reshard_after_forward": config.get("fsdp_reshard_after_forward", True),
        "wrap": wrap if policy == "TRANSFORMER_BASED_WRAP" else [],
    }
    if config.get("fsdp_offload_params"):
        engine["offload"] = True
    asks: dict[str, Said] = {}
    if config.get("fsdp_activation_checkpointing"):
        said = config.said["fsdp_activation_checkpointing"]
        asks["checkpointing"] = Said(said.name, "block", said.where, said.value)
    said_precision = config.get("fsdp_mixed_precision_policy")
    if not nothing_said(said_precision) and said_precision != config.get("mixed_precision", "no"):
        raise config.refusal("fsdp_mixed_precision_policy", "remove it, and say it in mixed_precision")
    strategy, engine = _on_axes(config, engine)
    return Resolution(strategy, _as_version_1(config, strategy, engine), asks=asks)


def _check_launcher(config: Request) -> None:
    """What accelerate's own launcher refuses."""
    said = config.said
    loading, states = said.get("fsdp_cpu_ram_efficient_loading"), said.get("fsdp_sync_module_states")
    if states and not states.value and (loading is None or loading.value):
        raise states.refusal("write true, or fsdp_cpu_ram_efficient_loading: false: accelerate launch wants them alike")


def _as_version_1(config: Request, strategy: str, engine: dict[str, Any]) -> dict[str, Any]:
    """The engine's settings with what fsdp_sharding_strategy asks for. Raises ConfigError where they contradict it."""
    asked = config.get("fsdp_sharding_strategy", "FULL_SHARD")
    if asked == "NO_SHARD":
        raise config.refusal("fsdp_sharding_strategy", "use ddp.yaml, which shards nothing")
    if asked.startswith("HYBRID") and strategy != "hsdp":
        instead = (
            "say the mesh in parallelism_config: parallelism_config_dp_replicate_size and _dp_shard_size, as hsdp.yaml"
        )
        raise config.refusal("fsdp_sharding_strategy", instead)
    if asked in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2"):
        if config.get("fsdp_reshard_after_forward", False):
            raise config.refusal("fsdp_sharding_strategy", "remove it: fsdp_reshard_after_forward says otherwise")
        return {**engine, "reshard_after_forward": False}
    return engine


def _on_axes(config: Request, engine: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """FSDP or HSDP, by the sizes of the mesh's axes. Raises ConfigError where they do not make the number of ranks."""
    replicas = config.get("parallelism_config_dp_replicate_size", 1)
    shards = config.get("parallelism_config_dp_shard_size", 1)
    ranks = config.get("num_processes", 1)
    if replicas * shards > 1 and replicas * shards != ranks:
        raise ConfigError(
            f"{config.shown}: {replicas} replicas (parallelism_config_dp_replicate_size) of {shards} ranks "
            f"(parallelism_config_dp_shard_size) are {replicas * shards} ranks, but there are {ranks}; change one of "
            f"the two, for example --parallelism_config_dp_shard_size {max(ranks // replicas, 1)}."
        )
    if replicas > 1 and shards == 1:
        instead = "replicas of one rank each shard nothing: use ddp.yaml"
        raise config.refusal("parallelism_config_dp_replicate_size", instead)
    if replicas > 1:
        engine = {**engine, "replicas": replicas}
    if found := fsdp_refusal(engine, ranks):
        raise config.refusal(*found)
    return ("hsdp" if replicas > 1 else "fsdp"), engine
