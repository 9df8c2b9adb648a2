"""Whether accelerate itself would launch a config: its own reading of the file, in this process, starting nothing."""

import os
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    TorchDynamoPlugin,
    launch,
)


def refusal(path: Path) -> Exception | None:
    """What `accelerate launch --config_file PATH` raises, in the launcher or where a rank reads what it exported; None
    where it goes on. That some extra is not installed here (torch_xla, sagemaker, an FP8 library) counts as no refusal.
    """
    with mock.patch.dict(os.environ), mock.patch.object(launch, "is_fp8_available", lambda: True):
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))]:
            del os.environ[name]
        try:
            environ = _launcher(path)
            if environ is not None:
                os.environ |= environ
                _rank()
        except ImportError:
            return None
        except Exception as error:
            return error
    return None


def _launcher(path: Path) -> dict[str, str] | None:
    """As accelerate's launch_command: the environment of the ranks. None where another launcher takes over."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    args, defaults, from_file = _validate_launch_command(args)
    if defaults.compute_environment != "LOCAL_MACHINE" or args.tpu:
        return None
    if args.use_deepspeed:
        fields = list(defaults.deepspeed_config) + ["mixed_precision"] * from_file
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        return launch.prepare_deepspeed_cmd_env(args)[1]
    if args.use_fsdp or args.use_megatron_lm or args.multi_gpu:
        return launch.prepare_multi_gpu_env(args)
    args.mpirun_hostfile = None  # mpirun is not there
    environ = launch.prepare_simple_launcher_cmd_env(args)[1]
    return environ


def _rank() -> None:
    """What an Accelerator would parse, as far as Shardrun goes by it."""
    TorchDynamoPlugin()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ["FSDP_VERSION"] != "1":  # 1 wants a GPU here
        FullyShardedDataParallelPlugin()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        DeepSpeedPlugin()
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        ParallelismConfig()
