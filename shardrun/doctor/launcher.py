"""What would come between a config file and its run: accelerate's default config, variables left in the environment."""

import os
from collections.abc import Iterator
from pathlib import Path

from shardrun.doctor import shell
from shardrun.doctor.report import Finding

STRATEGY_VARIABLES = ("ACCELERATE_USE_CPU",)
"""What is there already stays where a config says nothing of it. (Which strategy it is, a config file always says.)"""

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def default_config() -> Iterator[Finding]:
    """`accelerate config` writes a file that `accelerate launch` takes wherever no --config_file is given."""
    path = default_config_path()
    if not path.is_file():
        yield Finding("default config", "ok", "none: accelerate takes the config that it is given")
        return
    from shardrun.configs import resolve_config

    try:
        config = resolve_config(path)
        means = f"{config.strategy} on {config.world_size} ranks in {config.precision}"
    except (ValueError, OSError) as error:
        means = f"which Shardrun refuses ({str(error).replace(f'{path}: ', '').rstrip('.')})"
    said = f"{path} stands in wherever --config_file is forgotten: {means}"
    yield Finding("default config", "warning", said, shell.move_away(str(path), shell.current()))


def default_config_path() -> Path:
    """Where accelerate looks for it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.path.expanduser(os.environ.get("HF_HOME", os.path.join(cache, "huggingface")))
    return Path(home) / "accelerate" / "default_config.yaml"


def environment_variables() -> Iterator[Finding]:
    """Variables of an earlier launch, exported in this shell, that a config file does not take back."""
    left = [name for name in STRATEGY_VARIABLES if os.environ.get(name, "").lower() in ("true", "1", "yes")]
    others = [
        name
        for name in sorted(os.environ)
        if name.startswith(("ACCELERATE_", "FSDP_")) and name not in STRATEGY_VARIABLES or name in RANK_VARIABLES
    ]
    if left:
        said = f"{', '.join(left)}: a run is then on the CPU, whatever its config file is for"
        yield Finding("variables", "failure", said, shell.unset(left, shell.current()))
    if others:
        shown = ", ".join(others[:6]) + (" …" if len(others) > 6 else "")
        said = f"{shown} are set, and some go before a config file"
        yield Finding("variables", "warning", said, shell.unset(others, shell.current()))
    if not left and not others:
        yield Finding("variables", "ok", "none of accelerate's is set in this shell")
