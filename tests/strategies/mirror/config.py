"""What an accelerate config file says of the mirror: `main_training_function: mirror` beside MULTI_GPU."""

from strategies.config_keys import Key, Request, Resolution, used

DISTRIBUTED_TYPE = "MULTI_GPU"

SECTION = ""
"""Its section of a config file, if it has one."""

KEYS: dict[str, Key] = {"main_training_function": used("mirror: every gradient is all-reduced by itself")}
"""Key of a config → what it does here."""


def claims(config: Request) -> bool:
    """Whether a config asks for this."""
    said = config.said.get("main_training_function")
    return said is not None and said.value == "mirror"


def resolve(config: Request) -> Resolution:
    """What a config that this claims asks for."""
    return Resolution("mirror", {})
