"""What every key of accelerate's own config does here: used, without effect, or refused. Plain Python.

An allowlist, so that a key can only be called "without effect" where that was thought about. The keys of a strategy's
sections stand in its folder's config.py. A test walks the dataclasses of the installed accelerate.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from strategies.config_values import ConfigError, choice, nothing_said, short, truth, unchanged, whole

COMMAND_LINE, ENVIRONMENT = "accelerate launch", "the environment"
"""Where a key can be said, beside a file."""


@dataclass(frozen=True)
class Key:
    """What one key does."""

    kind: Literal["used", "without effect", "refused"]
    text: str
    """used: what it does; without effect: why; refused: what to write instead of a value that asks for something."""
    read: Callable[[Any], Any] = unchanged
    """The value as it is taken, None where it says nothing. Raises ConfigError where it is no value."""
    says_nothing: Callable[[Any], bool] = nothing_said
    """refused: whether a value asks for nothing, and so is let through."""


@dataclass(frozen=True)
class Said:
    """A key as somebody wrote it."""

    name: str
    """As it stands there, such as zero_optimization.stage."""
    value: Any
    where: str
    """A file's name, or COMMAND_LINE, or ENVIRONMENT."""
    written: Any = None
    """The value as it is written, where `value` is what it stands for."""

    def refusal(self, instead: str) -> ConfigError:
        """The sentence about this key. instead: what to write."""
        option = "--" if self.where == COMMAND_LINE else ""
        return ConfigError(f"{self.where}: {option}{short(self.name)} {short(self.value)} is not supported; {instead}.")

    def __str__(self) -> str:
        option = "--" if self.where == COMMAND_LINE else ""
        return f"{self.where}: {option}{self.name} {short(self.value if self.written is None else self.written)}"


@dataclass
class Request:
    """All keys that were said, by the names that accelerate gives them."""

    shown: str
    """The file's name, for sentences about no key of it."""
    said: dict[str, Said]
    values: dict[str, Any] = field(default_factory=dict)
    """The same, each as its entry reads it."""

    def get(self, key: str, default: Any = None) -> Any:
        """A key's value as it is taken; the default where nobody said it, or said null."""
        found = self.values.get(key)
        return default if found is None else found

    def refusal(self, key: str, instead: str) -> ConfigError:
        """The sentence about a key, said or not."""
        if key in self.said:
            return self.said[key].refusal(instead)
        return ConfigError(f"{self.shown}: {key} is not said; {instead}.")

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16, as accelerate's own keys say."""
        if self.get("fp16"):  # of accelerate's old format
            return "fp16"
        said = str(self.get("mixed_precision", "no"))
        return "fp32" if said == "no" else said

    def refuse_axes(self, replicas: int = 1) -> None:
        """For strategies that know no mesh. Raises ConfigError where other axes are asked for than so many replicas."""
        for key in ("parallelism_config_dp_replicate_size", "parallelism_config_dp_shard_size"):
            if (size := self.get(key, 1)) > 1 and not (key.endswith("replicate_size") and size == replicas):
                raise self.refusal(key, "remove it: a mesh is for distributed_type FSDP, as in hsdp.yaml")


@dataclass(frozen=True)
class Resolution:
    """What a strategy's config.py makes of a config."""

    strategy: str
    engine: dict[str, Any]
    """See strategies.base.Settings."""
    precision: str | None = None
    """fp32, bf16 or fp16 where the engine's own settings say it."""
    asks: dict[str, Said] = field(default_factory=dict)
    """As in `Asked`, beside what every config may ask."""
    lines: list[tuple[str, str, str]] = field(default_factory=list)
    """As in `Asked`, of files that the config names."""


def used(text: str, read: Callable[[Any], Any] = unchanged) -> Key:
    """A key that decides something."""
    return Key("used", text, read)


def idle(why: str, read: Callable[[Any], Any] = unchanged) -> Key:
    """A key that changes neither memory nor mathematics here. read: what accelerate itself takes."""
    return Key("without effect", why, read)


def refused(instead: str, says_nothing: Callable[[Any], bool] = nothing_said) -> Key:
    """A key whose values cannot be honoured, but for those that ask for nothing."""
    return Key("refused", instead, says_nothing=says_nothing)


def precision(value: Any) -> str:
    """mixed_precision as accelerate reads it: text, in any case."""
    if not isinstance(value, str):
        raise ConfigError("write 'no' in quotes (YAML reads a bare no as false), bf16 or fp16")
    return choice("no", "bf16", "fp16")(value)


def _plain_truth(value: Any) -> bool:
    if not isinstance(value, bool):  # accelerate takes any text for true, 'no' too
        raise ConfigError("remove it, and say mixed_precision")
    return value


def _count(value: Any) -> int:
    if value is None or isinstance(value, float):
        raise ConfigError("write a whole number from 1 on")
    return whole(1, 10**9)(value)


def _dynamo(value: Any) -> str | None:
    try:
        return None if value is None else choice("NO", "INDUCTOR")(value)
    except ConfigError:
        raise ConfigError("write INDUCTOR, which is what --compile compiles with, or 'NO' in quotes") from None


def _machines(value: Any) -> int:
    if isinstance(value, str):  # accelerate compares it with a number
        raise ConfigError("write the number without quotes")
    return _count(value)


def _port(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**16:
        raise ConfigError("write a whole number from 0 to 65535, without quotes")
    return value


def _one(value: Any) -> bool:
    return isinstance(value, int | float) and value in (0, 1)  # accelerate compares it with a number


def _gpu_ids(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise ConfigError("write it as text, such as '0,1' or all")
    return value or "all"


ELSEWHERE = "of a TPU pod, which this is not"

TOP: dict[str, Key] = {
    "compute_environment": refused("write LOCAL_MACHINE", lambda value: value == "LOCAL_MACHINE"),
    "distributed_type": used("the strategy"),
    "mixed_precision": used("the precision", precision),
    "fp16": used("accelerate's old way to write mixed_precision: fp16", _plain_truth),
    "use_cpu": used("runs on CPU over gloo; without it, on GPUs over NCCL", truth),
    "num_processes": used("ranks in all; the global batch is divided over them", _count),
    "num_machines": used("machines; num_processes counts the ranks of all of them", _machines),
    "machine_rank": used("which machine this is", whole(0, 10**6)),
    "main_process_ip": used("where rank 0 is"),
    "main_process_port": used("where the ranks meet; 0 is any free port", _port),
    "same_network": used("the machines reach each other directly", truth),
    "rdzv_backend": used("how the machines find each other"),
    "gpu_ids": used("which GPUs the ranks see", _gpu_ids),
    "debug": idle("accelerate checks the shapes in calls of its own, which are not used here"),
    "enable_cpu_affinity": idle("accelerate binds ranks to cores near their GPU: a matter of time alone"),
    "main_training_function": idle("for TPUs and notebooks; the module on the command line is run"),
    "downcast_bf16": idle("for TPUs"),
    "tpu_name": idle(ELSEWHERE),
    "tpu_zone": idle(ELSEWHERE),
    "tpu_use_cluster": idle(ELSEWHERE),
    "tpu_use_sudo": idle(ELSEWHERE),
    "tpu_vm": idle(ELSEWHERE),
    "tpu_env": idle(ELSEWHERE),
    "command_file": idle(ELSEWHERE),
    "commands": idle(ELSEWHERE),
    "dynamo_backend": used("torch.compile of the model's blocks, as --compile does, where it is INDUCTOR", _dynamo),
}
"""Of a config file, outside its sections."""

DYNAMO: dict[str, Key] = {
    "dynamo_backend": TOP["dynamo_backend"],
    "dynamo_mode": refused("remove it: blocks are compiled in the default mode"),
    "dynamo_use_fullgraph": refused("remove it or write false"),
    "dynamo_use_dynamic": refused("remove it or write false"),
    "dynamo_use_regional_compilation": idle("blocks are what is compiled, one by one, in any case"),
}

PARALLELISM: dict[str, Key] = {
    "parallelism_config_dp_replicate_size": used("replicas, each of which holds everything once", whole()),
    "parallelism_config_dp_shard_size": used(
        "ranks of a replica, over which everything is sharded; 1 beside one replica: all ranks", whole()
    ),
    **{f"parallelism_config_{axis}_size": refused("remove it or write 1", _one) for axis in ("tp", "cp", "sp")},
    **{
        f"parallelism_config_{key}": idle("acts on an axis that is one rank long here")
        for key in (
            *("cp_backend", "cp_comm_strategy", "sp_backend", "sp_seq_length"),
            *("sp_seq_length_is_variable", "sp_attn_implementation"),
        )
    },
}

MPIRUN: dict[str, Key] = {
    "quiet": used("is accelerate launch --quiet: no traceback of its own after a run's last word", truth),
    "mpirun_hostfile": refused("remove it: accelerate launch and torchrun start the ranks", lambda v: v is None),
    "mpirun_ccl": idle("for mpirun, which does not start the ranks"),
}

FIRST = ("compute_environment", "fsdp_version")
"""Keys that decide what the others mean."""

SECTIONS = {
    "fsdp_config": "fsdp_",
    "deepspeed_config": "",
    "parallelism_config": "",
    "dynamo_config": "dynamo_",
    "megatron_lm_config": "",
    "mpirun_config": "",
    "fp8_config": "fp8_",
}
"""Section of a config file → the prefix that accelerate puts before those of its keys that lack it."""

FOREIGN = {
    "megatron_lm_config": "only read with distributed_type MEGATRON_LM",
    "fp8_config": "only read with mixed_precision fp8",
}
"""Sections that nothing here reads, and why: their keys are accelerate's own."""
