"""Variables that another launcher has left in the shell: named before anything waits for ranks that nobody starts.

torchrun (which is inside accelerate launch), mpirun and srun tell a rank by variables who it is. In a shell of theirs,
or in a notebook, some of these stay, and a process that is started by hand takes itself for a rank.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from strategies.config_values import ConfigError, flag

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")

MEETING = ("MASTER_ADDR", "MASTER_PORT")

ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")
"""Switches that accelerate launch exports to ranks alone."""

MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""How many processes mpirun says that it has started. accelerate goes by them too."""

OTHERS_SIZES = (*MPI_SIZES, "SLURM_STEP_NUM_TASKS")
"""The same of mpirun or srun."""

HIGHEST_PORT = 65535

MEET = 30.0
"""Seconds in which the ranks must have met where nothing tells who has started them."""


def check(environ: Mapping[str, str], launched: bool) -> None:
    """Raise ConfigError where the variables cannot be those of a rank. launched: by accelerate launch."""
    numbers = {}
    for name in (*RANKS, *MPI_SIZES):
        if name in environ:
            lowest = int("SIZE" in name)
            if not environ[name].isdecimal() or int(environ[name]) < lowest:
                what = f"no whole number from {lowest} on"
                raise ConfigError(f"{name} is {environ[name]!r} in this shell, which is {what}: {_way_out(environ)}")
            numbers[name] = int(environ[name])
    rank, world_size = numbers.get("RANK"), numbers.get("WORLD_SIZE", 1)
    if rank is None:
        # Accelerate takes any of these for a rank's, and then asks for a meeting point.
        found = [name for name in ("WORLD_SIZE", *MPI_SIZES) if numbers.get(name, 1) > 1]
        found += ["LOCAL_RANK"] if "LOCAL_RANK" in numbers else []
        found += [name for name in ENGINES if flag(environ, name) and not launched]
        if found:
            raise ConfigError(
                f"{found[0]}={environ[found[0]]} is set in this shell, but no launcher started this process (there is "
                f"no RANK): {_way_out(environ)}"
            )
        return
    for one, of in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if one in numbers and numbers[one] >= numbers.get(of, world_size):
            said = f"{one}={numbers[one]} and {of if of in numbers else 'WORLD_SIZE'}={numbers.get(of, world_size)}"
            raise ConfigError(f"{said} are set in this shell, but ranks count from 0: {_way_out(environ)}")
    needed = MEETING if world_size > 1 else ("LOCAL_RANK", *MEETING)  # by which accelerate knows a single rank
    if missing := [name for name in needed if not environ.get(name)]:
        if unknown(environ, launched):
            said = f"RANK={rank} and WORLD_SIZE={world_size} are set in this shell, but not {' and '.join(missing)}"
            raise ConfigError(f"{said}, so no launcher started this process: {_way_out(environ)}")
    elif not environ["MASTER_PORT"].isdecimal() or int(environ["MASTER_PORT"]) > HIGHEST_PORT:
        raise ConfigError(f"MASTER_PORT is {environ['MASTER_PORT']!r}, which is no port: {_way_out(environ)}")


def name(variables: list[str], environ: Mapping[str, str]) -> None:
    """Say which of accelerate's variables a process without a launcher goes by."""
    if variables:
        said = ", ".join(f"{variable}={environ[variable]}" for variable in variables)
        print(f"shardrun: of this shell's variables this run goes by {said}.", file=sys.stderr, flush=True)


def unknown(environ: Mapping[str, str], launched: bool) -> bool:
    """Whether the variables say that this is a rank, and nothing says who has started it."""
    if "RANK" not in environ or launched or ("TORCHELASTIC_RUN_ID" in environ and _has_launcher()):
        return False
    return all(environ.get(name) != environ.get("WORLD_SIZE", "1") for name in OTHERS_SIZES)


def _has_launcher() -> bool:
    """Whether this process's parent may be torchrun: its variables stay in a shell or a notebook that a rank started.
    True where this cannot be told."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:  # no Linux
        return True
    return any(name in words for name in (b"python", b"accelerate", b"torchrun"))


def beside_one_process(environ: Mapping[str, str], shown: str) -> ConfigError:
    """What to raise where accelerate launch started one process in a shell that says there are several."""
    return ConfigError(f"{shown} is for one process, but {_said(environ)} are set in this shell: {_way_out(environ)}")


def waiting(environ: Mapping[str, str]) -> str:
    """What to say before this rank waits for the others."""
    return (
        f"{_said(environ)} are set in this shell, and nothing tells which launcher has started this process: waiting "
        f"{MEET:.0f} s for the other ranks at {environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}."
    )


def nobody(environ: Mapping[str, str], why: str) -> ConfigError:
    """What to raise where they have not come. why: of torch."""
    return ConfigError(
        f"{_said(environ)} are set in this shell, but the other ranks have not come to "
        f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')} within {MEET:.0f} s ({why}): {_way_out(environ)}"
    )


def _said(environ: Mapping[str, str]) -> str:
    return f"RANK={environ.get('RANK')} and WORLD_SIZE={environ.get('WORLD_SIZE', '1')}"


def _way_out(environ: Mapping[str, str]) -> str:
    names = [name for name in (*RANKS, *MEETING, *ENGINES, *MPI_SIZES) if name in environ]
    return f"`unset {' '.join(names)}`, or start the ranks with accelerate launch."
