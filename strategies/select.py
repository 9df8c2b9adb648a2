"""From what `accelerate launch` asked for to a Strategy, refusing to run as anything else.

Accelerate reads the config file, starts the processes and exports what it resolved. What it was asked for we read
ourselves (strategies/config_file.py): the same file, its command line, and the environment. We then call the engines
directly, because on CPU accelerate's own path falls back without a word
to plain DDP or even to processes that each train alone, and a fallback looks like success. So everything that was
asked for is checked here against what is there.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from strategies import catalogue, config_file, left_over
from strategies.base import Precision, Settings, Strategy
from strategies.config_file import Asked
from strategies.config_keys import COMMAND_LINE, DYNAMO, ENVIRONMENT, FOREIGN, MPIRUN, PARALLELISM, TOP, Said
from strategies.config_values import ConfigError, flag
from strategies.mesh import Place

CPU_CONFIGS = Path(__file__).parent.parent / "accelerate_configs/cpu"

COLLECTIVE_TIMEOUT = 600.0
"""Seconds after which a collective that a rank never joins ends with an error."""


ALL_KEYS = (
    {key for folder in catalogue.configs() for key in folder.KEYS}
    | set(DYNAMO)
    | set(PARALLELISM)
    | set(MPIRUN)
    | set(TOP)
)
"""That the command line may say too."""

OTHERS = tuple(section.removesuffix("config") for section in FOREIGN)
"""What options for launches of other kinds begin with."""


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
    asks: dict[str, Said] = field(default_factory=dict)
    """What it asks of the trainer: see strategies.config_file.Asked."""


def launched() -> Launch:
    """Read and check what this process was launched as. Starts nothing.

    Raises ConfigError, in one sentence, for everything that this machine or this project cannot do as asked.
    """
    command, environ = _launch_command(), os.environ
    left_over.check(environ, launched=command is not None)
    file = command.config_file if command else None
    path = Path(file) if file and os.path.isfile(file) else None
    world_size = int(environ.get("WORLD_SIZE", 1))
    local_world_size = int(environ.get("LOCAL_WORLD_SIZE", world_size))
    beside = said_beside(path, command, environ)
    if path is None and not torch.cuda.is_available():  # nobody said on what: whatever there is
        beside.setdefault("use_cpu", Said("use_cpu", True, "this machine"))
    if command is None and "RANK" not in environ:
        left_over.name(
            [said.name for said in beside.values() if said.where == ENVIRONMENT and said.name in environ], environ
        )
    found = config_file.asked(path, beside, ranks=world_size)
    shown = file or "the accelerate config"
    if found.world_size != world_size and command and command.cpu:
        raise ConfigError(
            f"{shown}: accelerate launch --cpu starts one process, and {found.world_size} were asked for; leave out "
            "--cpu (a config for CPUs has use_cpu: true), or add --num_processes 1."
        )
    if found.strategy == "single" and world_size > 1 and "TORCHELASTIC_RUN_ID" not in environ:
        raise left_over.beside_one_process(environ, shown)
    if found.world_size != world_size:
        raise ConfigError(
            f"{shown}: {found.world_size} processes were asked for but {world_size} started "
            f"({beside.get('distributed_type', 'see its distributed_type')}); "
            "use accelerate_configs/ddp.yaml, fsdp.yaml or a zero*.yaml for more than one."
        )
    if not found.cpu:
        _check_gpus(shown, found, local_world_size)
    catalogue.look_here(found.strategy, found.cpu)
    return Launch(
        strategy=found.strategy,
        rank=int(environ.get("RANK", 0)),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        world_size=world_size,
        local_world_size=local_world_size,
        precision=found.precision,  # type: ignore[arg-type]
        cpu=found.cpu,
        engine=found.engine,
        config_file=file,
        config=config_file.read_mapping(path) if path else {},
        asks=found.asks,
    )


FLAGS = {
    "use_deepspeed": "DEEPSPEED",
    "use_fsdp": "FSDP",
    "use_megatron_lm": "MEGATRON_LM",
    "tpu": "XLA",
    "multi_gpu": "MULTI_GPU",
}
"""Option of accelerate launch → the distributed_type that it stands for."""

EXPORTED: dict[str, tuple[str, str] | dict[str, tuple[str, str]]] = {
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "no"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "NO"),
    "ACCELERATE_USE_CPU": ("use_cpu", "False"),
    "ACCELERATE_USE_FSDP": {
        "FSDP_VERSION": ("fsdp_version", "1"),
        "FSDP_SHARDING_STRATEGY": ("fsdp_sharding_strategy", "FULL_SHARD"),
        "FSDP_RESHARD_AFTER_FORWARD": ("fsdp_reshard_after_forward", "true"),
        "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "false"),
        "FSDP_AUTO_WRAP_POLICY": ("fsdp_auto_wrap_policy", "NO_WRAP"),
        "FSDP_TRANSFORMER_CLS_TO_WRAP": ("fsdp_transformer_layer_cls_to_wrap", ""),
        "FSDP_FORWARD_PREFETCH": ("fsdp_forward_prefetch", "false"),
        "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "false"),
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("fsdp_activation_checkpointing_offload", "false"),
        "FSDP_IGNORED_MODULES": ("fsdp_ignored_modules", ""),
    },
    "ACCELERATE_USE_PARALLELISM_CONFIG": {
        f"PARALLELISM_CONFIG_{axis}_SIZE": (f"parallelism_config_{axis.lower()}_size", "1")
        for axis in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")
    },
    "ACCELERATE_USE_DEEPSPEED": {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("zero_stage", ""),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("deepspeed_config_file", ""),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("offload_optimizer_device", "none"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("offload_param_device", "none"),
        "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "auto"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "auto"),
        "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": ("deepspeed_moe_layer_cls_names", ""),
    },
}
"""Variable that accelerate exports → the key that it stands for, and what it exports where nobody said anything; or the
switch of several such.
"""


def said_beside(path: Path | None, command: Namespace | None, environ: Mapping[str, str]) -> dict[str, Said]:
    """What accelerate's command line says, and the environment where neither that nor the file does.

    The launcher exports what it read, so the environment repeats the file; where its command line is not to be seen
    (another launcher on another machine), the environment is all there is.
    """
    options = vars(command) if command else {}
    found = {
        name: Said(name, options[name], COMMAND_LINE)
        for name in options.get("nondefault", ())
        if (name in ALL_KEYS or name.startswith(OTHERS)) and options[name] is not None
    }
    kind = next((kind for flag_, kind in FLAGS.items() if options.get(flag_)), None)
    if kind:
        found["distributed_type"] = Said("distributed_type", kind, COMMAND_LINE)
    if options.get("cpu"):
        found["use_cpu"] = Said("cpu", True, COMMAND_LINE)
    written = set(config_file.of_file(path)) if path else set()
    if "fp16" in written:  # the old way to say it
        written.add("mixed_precision")
    if path is None and "distributed_type" not in found:
        several = "MULTI_GPU" if "RANK" in environ else "NO"
        kinds = ("DEEPSPEED", "FSDP", "MEGATRON_LM")
        kind = next((kind for kind in kinds if flag(environ, f"ACCELERATE_USE_{kind}")), several)
        found["distributed_type"] = Said("distributed_type", kind, ENVIRONMENT)
    for variable, entry in EXPORTED.items():
        if isinstance(entry, tuple):
            group = {variable: entry}
        else:
            group = entry if flag(environ, variable) else {}
        for name, (key, default) in group.items():
            value = environ.get(name)
            if key not in found and key not in written and value not in (None, "None", default):
                found[key] = Said(name, value, ENVIRONMENT)
    return found


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
        if launch.world_size > 1 and not torch.distributed.is_initialized():
            meeting = all(name in os.environ for name in left_over.MEETING)  # else `launched` has refused it
            if meeting and left_over.unknown(os.environ, launched=_launch_command() is not None):
                _meet(launch, timeout)
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
    return catalogue.engine(
        launch.strategy, Settings(place, launch.precision, launch.engine, launch.config_file or "the accelerate config")
    )


def bound_collectives(timeout: float) -> None:
    """Give every process group of this rank the timeout of the first: DeepSpeed makes groups of its own, with torch's
    default of half an hour. Call it when the strategy is prepared. timeout: seconds.
    """
    groups = torch.distributed.distributed_c10d
    for group in list(groups._world.pg_map) if torch.distributed.is_initialized() else ():
        if torch.distributed.get_rank(group) >= 0:
            groups._set_pg_timeout(timedelta(seconds=timeout), group)


def _meet(launch: Launch, timeout: float) -> None:
    """The process group of ranks of which nothing tells who has started them: perhaps there are none.

    Raises ConfigError where the others do not come.
    """
    print(f"shardrun: {left_over.waiting(os.environ)}", file=sys.stderr, flush=True)
    try:
        _start_group("gloo" if launch.cpu else "nccl", launch, timeout, left_over.MEET)
    except torch.distributed.DistError as error:
        raise left_over.nobody(os.environ, str(error).partition("\n")[0]) from error


def _start_group(backend: str, launch: Launch, timeout: float, meet: float | None = None) -> None:
    """The process group, where accelerate's would not do. meet: seconds within which all ranks must have come.

    On GPUs it is told this rank's device, which neither accelerate nor DeepSpeed passes on: a barrier has no tensor to
    tell it by. After a restart by torchrun, whose store still holds the addresses of the ranks that ended, it stands
    under names of its own, or the new ranks would call the old ones.
    """
    within = {} if meet is None else {"timeout": timedelta(seconds=meet)}
    store, rank, world_size = next(torch.distributed.rendezvous("env://", launch.rank, launch.world_size, **within))
    if meet is not None:
        store.set_timeout(timedelta(seconds=timeout))
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


def _check_gpus(shown: str, found: Asked, local_world_size: int) -> None:
    """Raises ConfigError where GPUs were asked for that are not there."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{shown} is for GPUs (use_cpu is not true) and this machine has none that torch can use; "
            f"use accelerate_configs/cpu/{_cpu_config(shown, found)} to run on CPU."
        )
    if local_world_size > torch.cuda.device_count():
        raise ConfigError(
            f"{shown}: {local_world_size} processes on this machine, which has {torch.cuda.device_count()} GPUs; "
            f"launch with --num_processes {torch.cuda.device_count()} (the global batch stays the same)."
        )


def _cpu_config(config_file: str, found: Asked) -> str:
    """The file in accelerate_configs/cpu/ that stands for this one: of the same name, or of the same strategy."""
    name = Path(config_file).name
    return name if (CPU_CONFIGS / name).is_file() else f"{found.strategy}.yaml"
