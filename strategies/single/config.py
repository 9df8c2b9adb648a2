"""What an accelerate config file says of single: `distributed_type: 'NO'`, one process. Plain Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strategies.config_values import short

DISTRIBUTED_TYPE = "NO"

EFFECTS: dict[str, str] = {}
"""Key of a config → what it does here."""


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config file, as read, asks for this."""
    return short(config.get("distributed_type", "NO")) == DISTRIBUTED_TYPE


def written(path: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The strategy's name and its engine's settings, out of a config file that this claims."""
    return "single", {}


def launched(environ: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Whether what `accelerate launch` exported to this process, or the file that it read, asks for this."""
    kinds = (DISTRIBUTED_TYPE, "False", "MULTI_GPU")  # unquoted NO is False; of one GPU accelerate makes one process
    return "RANK" not in environ and short(config.get("distributed_type", DISTRIBUTED_TYPE)) in kinds


def exported(shown: str, cpu: bool) -> tuple[str, dict[str, Any]]:
    """As `written`, out of what `accelerate launch` exported. shown: the config's name, for errors."""
    return "single", {}
