"""What an accelerate config file says of the mirror: `main_training_function: mirror` beside MULTI_GPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

DISTRIBUTED_TYPE = "MULTI_GPU"

EFFECTS = {"main_training_function": "mirror: every gradient is all-reduced by itself"}
"""Key of a config → what it does here."""


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config file, as read, asks for this."""
    return config.get("main_training_function") == "mirror"


def written(path: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The strategy's name and its engine's settings, out of a config file that this claims."""
    return "mirror", {}


def launched(environ: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Whether what `accelerate launch` exported to this process, or the file that it read, asks for this."""
    return claims(config)


def exported(shown: str, cpu: bool) -> tuple[str, dict[str, Any]]:
    """As `written`, out of what `accelerate launch` exported. shown: the config's name, for errors."""
    return "mirror", {}
