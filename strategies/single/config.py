"""What an accelerate config file says of single: `distributed_type: 'NO'`, one process. Plain Python."""

from strategies.config_keys import Key, Request, Resolution

DISTRIBUTED_TYPE = "NO"

SECTION = ""
"""Its section of a config file, if it has one."""

KEYS: dict[str, Key] = {}
"""Key of a section of its own → what it does."""


def claims(config: Request) -> bool:
    """Whether a config asks for this."""
    return config.get("distributed_type") == DISTRIBUTED_TYPE


def resolve(config: Request) -> Resolution:
    """What a config that this claims asks for."""
    if (ranks := config.get("num_processes", 1)) != 1:
        raise config.refusal(
            "num_processes",
            f"distributed_type NO starts one process, not {ranks}: use ddp.yaml, fsdp.yaml or a zero*.yaml",
        )
    config.refuse_axes()
    return Resolution("single", {})
