"""An accelerate config file, for the verbs: what a launch makes of it, and of the model that it trains.

The reader is the launch's own (strategies/config_file.py). Without accelerate and without torch.
"""

from pathlib import Path
from typing import Any

from speedrun.run.asked import check_units
from strategies.config_file import Asked, asked
from strategies.config_keys import COMMAND_LINE, Said


def resolve_config(path: Path, **options: Any) -> Asked:
    """Read a config. options: of accelerate launch, with which it is going to be launched.

    Raises ConfigError, in one sentence, where it is none or asks for what is not supported, and FileNotFoundError where
    there is no such file.
    """
    found = asked(path, {name: Said(name, value, COMMAND_LINE) for name, value in options.items()})
    check_units(found.engine.get("wrap", ()), path)
    return found
