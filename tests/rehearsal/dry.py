"""A documented launch up to where it would start a process group, on a machine with 8 fake GPUs (tests/fake_cuda)."""

import contextlib
import io
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from speedrun.run.checks import check
from speedrun.run.command_line import parse
from strategies import select
from tests.fake_cuda.device import fake_gpus
from tests.speedrun.test_select import VARIABLES, pretend_parent
from tests.test_accelerate_configs import launched_environment

TRAINER = "speedrun.train"


def dry_run(words: tuple[str, ...], folder: str, beside: str) -> list[str]:
    """The checks of the first rank and of the last. words: `accelerate launch …` or `python -m speedrun.train …`.

    folder: where a reader types it; beside: where the file with the command is, for scripts that are beside it. Returns
    a line for each rank: what it was launched as, and for the trainer what it would train. Raises what the ranks raise.
    """
    with contextlib.chdir(folder), fake_gpus():
        if words[:2] != ("accelerate", "launch"):
            return [_rank(words, None, 0, list(words[3:]))]
        with _errors():
            arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
        if not arguments.module:
            script = Path(arguments.training_script)
            assert script.is_file() or (Path(beside) / script).is_file(), f"there is no {script}"
        ranks = sorted({0, arguments.num_processes - 1})
        of_trainer = arguments.training_script_args if arguments.training_script == TRAINER else None
        return [_rank(words, (arguments, defaults), rank, of_trainer) for rank in ranks]


def _rank(
    words: tuple[str, ...], launch: tuple[Namespace, object] | None, rank: int, of_trainer: list[str] | None
) -> str:
    """What this rank does before it starts anything. of_trainer: the trainer's arguments, None for another script."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in VARIABLES:
            patch.delenv(variable, raising=False)
        if launch is not None:
            arguments, defaults = launch
            for variable, value in launched_environment(arguments, defaults).items():
                patch.setenv(variable, value)
            world_size, here = arguments.num_processes, arguments.num_processes // arguments.num_machines
            if world_size > 1:
                ours = {"RANK": rank, "LOCAL_RANK": rank % here, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": here}
                for variable, number in ours.items():
                    patch.setenv(variable, str(number))
        pretend_parent(patch, list(words) if launch is not None else ["bash"])
        launched = select.launched()
        said = f"rank {launched.rank} of {launched.world_size}: {launched.strategy}, {launched.precision}"
        if of_trainer is None:
            return said
        if "--help" in of_trainer:
            with pytest.raises(SystemExit, match="0"), contextlib.redirect_stdout(io.StringIO()):
                parse(of_trainer)
            return said
        with _errors():
            preset, config = parse(of_trainer)
        cuts = [stage.batches for stage in check(config, launched).stages]
        batches = ", ".join(f"{cut.rows} rows in micro-batches of {cut.micro_batch}" for cut in cuts)
        return f"{said}; {preset}: {batches}"


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What a parser prints before it ends the process, as an error."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            yield
    except SystemExit as end:
        raise ValueError(printed.getvalue()) from end
