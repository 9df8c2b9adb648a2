"""The trainer's command line: a preset, and options that replace single fields of it."""

from dataclasses import replace

from speedrun.config import Config
from speedrun.data.vocabulary import vocabulary_of
from speedrun.presets import PRESETS
from speedrun.ranges import check_ranges
from speedrun.run.last_words import leave_for_torchrun, say_after_launcher, speaks_first
from strategies.errors import UserError

HELP = """Train a preset under the strategy of an accelerate config file:

    accelerate launch --config_file accelerate_configs/cpu/zero2.yaml -m speedrun.train tiny --steps 100

The config file says how the run is spread over ranks and in which precision; the options say all else."""


def parse(arguments: list[str]) -> tuple[str, Config]:
    """`[PRESET] [--section.field value …]` → the preset's name and the whole configuration.

    The model has as many tokens as the data's sidecar says, where there is one and no option says otherwise.

    Raises ValueError for an unknown preset, a value out of its range or a broken sidecar; SystemExit after showing the
    help, or what is wrong with a field.
    """
    if not arguments or arguments[0].startswith("-"):
        arguments = ["tiny", *arguments]
    preset, *options = arguments
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}.")
    try:
        config = _with_vocabulary(preset, _read(preset, options, show=False))
    except SystemExit as end:
        if end.code:
            wrong = "the command line is wrong; what is printed above says where."
            leave_for_torchrun(wrong)
            say_after_launcher(f"shardrun: error: {wrong}")
        if speaks_first("command line"):
            _read(preset, options, show=True)
        raise
    check_ranges(config)
    return preset, config


def _with_vocabulary(preset: str, config: Config) -> Config:
    """With the tokens of the data, or else of the preset, where the command line does not say how many."""
    if config.model.vocab_size:
        return config
    check_ranges(config.data, "data.")
    size = vocabulary_of(config.data.source) or PRESETS[preset][1].model.vocab_size
    return replace(config, model=replace(config.model, vocab_size=size))


def _read(preset: str, options: list[str], show: bool) -> Config:
    """show: print the help, or what is wrong. Else model.vocab_size is 0 where no option says it."""
    import tyro

    default = PRESETS[preset][1]
    if not show:
        default = replace(default, model=replace(default.model, vocab_size=0))

    presets = "\n".join(f"    {name}: {about}" for name, (about, _) in PRESETS.items())
    return tyro.cli(
        Config,
        default=default,
        prog=f"speedrun.train {preset}",
        description=f"{HELP}\n\nPresets:\n{presets}\n\nThe defaults below are those of {preset}.",
        args=options,
        console_outputs=show,
    )
