"""What an accelerate config file says of DDP: `distributed_type: MULTI_GPU`, on CPU too. Plain Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strategies.config_values import short

DISTRIBUTED_TYPE = "MULTI_GPU"

EFFECTS: dict[str, str] = {}
"""Key of a config → what it does here."""


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config file, as read, asks for this."""
    return short(config.get("distributed_type")) == DISTRIBUTED_TYPE


def written(path: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The strategy's name and its engine's settings, out of a config file that this claims."""
    return "ddp", {}


def launched(environ: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    """Whether what `accelerate launch` exported to this process, or the file that it read, asks for this: several
    ranks, and no other distributed_type. (With 'NO' accelerate starts several where the command line says so.)"""
    return "RANK" in environ and short(config.get("distributed_type", "NO")) in (DISTRIBUTED_TYPE, "NO", "False")


def exported(shown: str, cpu: bool) -> tuple[str, dict[str, Any]]:
    """As `written`, out of what `accelerate launch` exported. shown: the config's name, for errors."""
    return "ddp", {}
