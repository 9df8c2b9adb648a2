"""From what `accelerate launch` asked for to a Strategy, refusing to run as anything else.

Accelerate reads the config file, starts the processes and exports what it resolved as environment variables; its
plugins parse those. We then call the engines directly, because on CPU accelerate's own path falls back without a word
to plain DDP or even to processes that each train alone, and a fallback looks like success. So everything that was
asked for is checked here against what is there.
"""

import os
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from strategies import catalogue
from strategies.base import Precision, Settings, Strategy
from strategies.config_values import flag
from strategies.mesh import Place

CPU_CONFIGS = Path(__file__).parent.parent / "accelerate_configs/cpu"

COLLECTIVE_TIMEOUT = 600.0
"""Seconds after which a collective that a rank never joins ends with an error."""


@dataclass(frozen=True)
class Launch:
    """What accelerate launch asked for. The same on every rank but for `rank` and `local_rank`."""

    strategy: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    precision: Precision
    cpu: bool
    engine: dict[str, Any] = field(default_factory=dict)
    config_file: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    """The accelerate config file as written, for the run's record."""


def launched() -> Launch:
    """Read and check what this process was launched as. Starts nothing.

    Raises ValueError, in one sentence, for everything that this machine or this project cannot do as asked.
    """
    command = _launch_command()
    config_file = command.config_file if command else None
    config = _read_config(config_file)
    shown = config_file or "the accelerate config"
    environ = os.environ
    world_size = int(environ.get("WORLD_SIZE", 1))
    local_world_size = int(environ.get("LOCAL_WORLD_SIZE", world_size))
    asked = int((command and command.num_processes) or config.get("num_processes") or world_size)
    if str(config.get("distributed_type")) == "MULTI_CPU":
        raise ValueError(
            f"{shown}: distributed_type MULTI_CPU starts a single process under accelerate launch; "
            "write MULTI_GPU with use_cpu: true, as accelerate_configs/cpu/ddp.yaml does."
        )
    if asked != world_size:
        raise ValueError(
            f"{shown}: {asked} processes were asked for but {world_size} started "
            f"(distributed_type {config.get('distributed_type', 'NO')}); "
            "use accelerate_configs/ddp.yaml, fsdp.yaml or a zero*.yaml for more than one."
        )
    cpu = _on_cpu(shown, bool(config.get("use_cpu") or (command and command.cpu)), config, local_world_size)
    strategy, engine = _strategy_and_engine(shown, cpu, config)
    return Launch(
        strategy=strategy,
        rank=int(environ.get("RANK", 0)),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        world_size=world_size,
        local_world_size=local_world_size,
        precision=_precision(shown, engine),
        cpu=cpu,
        engine=engine,
        config_file=config_file,
        config=config,
    )


def start(launch: Launch, timeout: float = COLLECTIVE_TIMEOUT) -> Strategy:
    """Start the process group as launched and return the strategy, not yet prepared.

    timeout: seconds that a collective waits for a rank that hangs, before all end.

    Raises RuntimeError where the process group is not the one that was asked for.
    """
    if launch.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # what `use_cpu: true` should have exported
        if launch.local_world_size == launch.world_size:
            # One machine: gloo need not find an address for the host's name, which on many laptops it cannot.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    from accelerate import PartialState

    if launch.strategy == "single":
        state = PartialState(cpu=launch.cpu)
    else:
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if (restarted or not launch.cpu) and not torch.distributed.is_initialized():
            _start_group("gloo" if launch.cpu else "nccl", launch, timeout)  # accelerate takes it as it finds it
        state = PartialState(cpu=launch.cpu, timeout=timedelta(seconds=timeout))
    backend = "gloo" if launch.cpu else "nccl"
    if launch.world_size != state.num_processes or launch.rank != state.process_index:
        raise RuntimeError(
            f"rank {launch.rank} of {launch.world_size} was launched, "
            f"but the process group says rank {state.process_index} of {state.num_processes}"
        )
    if launch.strategy != "single" and backend not in torch.distributed.get_backend():
        raise RuntimeError(f"backend {backend} was asked for, but {torch.distributed.get_backend()} is running")
    place = Place(launch.rank, launch.world_size, state.device)
    return catalogue.engine(launch.strategy, Settings(place, launch.precision, launch.engine))


def bound_collectives(timeout: float) -> None:
    """Give every process group of this rank the timeout of the first: DeepSpeed makes groups of its own, with torch's
    default of half an hour. Call it when the strategy is prepared. timeout: seconds.
    """
    groups = torch.distributed.distributed_c10d
    for group in list(groups._world.pg_map) if torch.distributed.is_initialized() else ():
        if torch.distributed.get_rank(group) >= 0:
            groups._set_pg_timeout(timedelta(seconds=timeout), group)


def _start_group(backend: str, launch: Launch, timeout: float) -> None:
    """The process group, where accelerate's would not do.

    On GPUs it is told this rank's device, which neither accelerate nor DeepSpeed passes on: a barrier has no tensor to
    tell it by. After a restart by torchrun, whose store still holds the addresses of the ranks that ended, it stands
    under names of its own, or the new ranks would call the old ones.
    """
    store, rank, world_size = next(torch.distributed.rendezvous("env://", launch.rank, launch.world_size))
    store = torch.distributed.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    device = None if launch.cpu else torch.device("cuda", launch.local_rank)
    if device:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout), device_id=device
    )


def _launch_command() -> Namespace | None:
    """The options of the `accelerate launch` above this process, as its own parser reads them; None without one.

    Accelerate exports most of what it read, but neither the file's name nor `use_cpu`; the parent's command line is the
    only place where they can be found.
    """
    import psutil

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    # `accelerate launch …`, `accelerate-launch …`, or `python -m accelerate.commands.launch …`
    program = next((i for i, word in enumerate(words[:4]) if "accelerate" in Path(word).name), None)
    if program is None:
        return None
    options = words[program + 1 :]
    if "launch" not in words[program]:
        if options[:1] != ["launch"]:
            return None
        options = options[1:]
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    command = launch_command_parser().parse_args(options)
    if command.config_file is None and os.path.isfile(default_config_file):
        command.config_file = default_config_file
    return command


def _read_config(config_file: str | None) -> dict[str, Any]:
    if config_file is None or not os.path.isfile(config_file):
        return {}
    import yaml

    with open(config_file, encoding="utf-8") as file:
        config = yaml.safe_load(file)  # JSON is YAML
    return config if isinstance(config, dict) else {}


def _on_cpu(shown: str, asked: bool, config: dict[str, Any], local_world_size: int) -> bool:
    """Whether to run on CPU. Raises ValueError where GPUs were asked for that are not there."""
    if asked or flag(os.environ, "ACCELERATE_USE_CPU"):
        return True
    if not torch.cuda.is_available():
        if not config:
            return True  # started without accelerate, or without a config file: whatever there is
        raise ValueError(
            f"{shown} is for GPUs (use_cpu is not true) and this machine has none that torch can use; "
            f"use accelerate_configs/cpu/{_cpu_config(shown, config)} to run on CPU."
        )
    if local_world_size > torch.cuda.device_count():
        raise ValueError(
            f"{shown}: {local_world_size} processes on this machine, which has {torch.cuda.device_count()} GPUs; "
            f"launch with --num_processes {torch.cuda.device_count()} (the global batch stays the same)."
        )
    return False


def _cpu_config(config_file: str, config: dict[str, Any]) -> str:
    """The file in accelerate_configs/cpu/ that stands for this one: of the same name, or of the same strategy."""
    name = Path(config_file).name
    if (CPU_CONFIGS / name).is_file():
        return name
    return f"{_strategy_and_engine(config_file, True, config)[0]}.yaml"


def _precision(shown: str, engine: dict[str, Any]) -> Precision:
    """What accelerate exported, unless a DeepSpeed config file sets a precision of its own."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    for other in ("bf16", "fp16"):
        if engine.get(other, {}).get("enabled") is True:
            precision = other
    if precision == "no":
        return "fp32"
    if precision == "bf16":
        return "bf16"
    raise ValueError(f"{shown}: mixed_precision {precision!r} is not supported; write 'no' or bf16.")


def _strategy_and_engine(shown: str, cpu: bool, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The strategy that accelerate exported, and its engine's settings as accelerate's own plugin parses them."""
    asked = next((folder for folder in catalogue.configs() if folder.launched(os.environ, config)), None)
    if asked is None:
        raise ValueError(catalogue.no_such_type(shown, config))
    strategy, engine = asked.exported(shown, cpu)
    return strategy, engine
