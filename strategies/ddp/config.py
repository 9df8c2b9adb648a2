"""What an accelerate config file says of DDP: `distributed_type: MULTI_GPU`, on CPU too. Plain Python."""

from strategies.config_keys import Key, Request, Resolution

DISTRIBUTED_TYPE = "MULTI_GPU"

SECTION = ""
"""Its section of a config file, if it has one."""

KEYS: dict[str, Key] = {}
"""Key of a section of its own → what it does."""


def claims(config: Request) -> bool:
    """Whether a config asks for this."""
    return config.get("distributed_type") == DISTRIBUTED_TYPE


def resolve(config: Request) -> Resolution:
    """What a config that this claims asks for."""
    config.refuse_axes(replicas=config.get("num_processes", 1))
    return Resolution("ddp", {})
