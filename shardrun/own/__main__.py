"""`-m shardrun.own FILE`, and then what speedrun.train takes: the trainer, under FILE's strategy."""

import sys
from dataclasses import replace
from pathlib import Path

from shardrun.own import register
from speedrun.run.command_line import parse
from speedrun.run.ending import guarded
from speedrun.train import train
from strategies import select
from strategies.errors import UserError


def main() -> None:
    """Raises UserError where there is no such file, or the run asks for what such a strategy cannot do."""
    if len(sys.argv) < 2:
        raise UserError("name the file of your strategy: -m shardrun.own my_ddp.py tiny.")
    own = register(Path(sys.argv[1]))
    preset, config = parse(sys.argv[2:])
    if config.checkpoint.every or config.resume != "none":
        raise UserError(f"{own.path.name} saves no checkpoints: leave out --checkpoint.every and --resume.")
    launch = select.launched()
    if launch.engine or launch.world_size < 2:
        raise UserError("launch a strategy of your own with a config for DDP, on two ranks or more.")
    train(preset, config, replace(launch, strategy=own.name))


if __name__ == "__main__":
    guarded(main)
