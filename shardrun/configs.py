"""An accelerate config file, for the verbs: what a launch makes of it, and of the model that it trains.

The reader is the launch's own (strategies/config_file.py). Without accelerate and without torch.
"""

from pathlib import Path

from speedrun.run.asked import check_units
from strategies.config_file import Asked, asked


def resolve_config(path: Path) -> Asked:
    """Read a config. Raises ConfigError, in one sentence, where it is none or asks for what is not supported, and
    FileNotFoundError where there is no such file."""
    found = asked(path)
    check_units(found.engine.get("wrap", ()), path)
    return found
