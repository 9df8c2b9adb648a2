"""Every key that the installed accelerate and DeepSpeed read has an entry: used, without effect, or refused."""

import ast
import dataclasses
import inspect
import typing
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, SageMakerConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin

from strategies import catalogue
from strategies.config_keys import DYNAMO, FOREIGN, MPIRUN, PARALLELISM, SECTIONS, TOP, Key
from strategies.config_values import ConfigError, at_most_one, choice, not_enabled, nothing_said, number, truth, whole
from strategies.fsdp import config as fsdp
from strategies.zero import config as zero
from strategies.zero import json_keys

ALL: dict[str, Key] = {**TOP, **DYNAMO, **PARALLELISM, **MPIRUN, **fsdp.KEYS, **zero.KEYS}

NOT_IN_A_FILE = {
    "state_dict_type",
    "cpu_offload",  # fsdp_offload_params in a file
    "param_init_fn",
    "transformer_cls_names_to_wrap",  # fsdp_transformer_layer_cls_to_wrap in a file
    "fsdp_version",
}
"""Of accelerate's FSDP plugin: what only a Python program can give it, or what has another name in a file."""

OPTIONS_OF_A_START = (
    *("help", "config_file", "quiet", "cpu", "multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_parallelism_config"),
    *("use_megatron_lm", "num_cpu_threads_per_process", "tee", "log_dir", "role", "rdzv_conf", "max_restarts"),
    *("monitor_interval", "module", "no_python", "tpu_cluster", "vm", "env", "aws_access_key_id", "training_script"),
    *("aws_secret_access_key", "training_script_args"),
)
"""Of accelerate launch: how processes are started, or which type is meant (select.FLAGS); no key of a file."""


def test_every_key_of_a_config_file() -> None:
    names = {field.name for field in dataclasses.fields(ClusterConfig)} | {"fp16", "dynamo_backend"}
    assert names - set(TOP) - set(SECTIONS) - {"ipex_config"} == set()  # which accelerate 1.15 refuses itself
    sagemaker = {field.name for field in dataclasses.fields(SageMakerConfig)} - names
    assert sagemaker, "only read with compute_environment AMAZON_SAGEMAKER, which is refused"
    assert not TOP["compute_environment"].says_nothing("AMAZON_SAGEMAKER")


def test_every_option_of_accelerate_launch() -> None:
    for action in launch_command_parser()._actions:
        name, foreign = action.dest, tuple(section.removesuffix("config") for section in FOREIGN)
        if name not in OPTIONS_OF_A_START and not name.startswith(
            (*foreign, "tpu_", "ipex", "use_xpu", "use_mps_device")
        ):
            assert name in ALL, name


def test_every_field_of_the_plugins() -> None:
    for field in dataclasses.fields(FullyShardedDataParallelPlugin):
        if field.init and field.name not in NOT_IN_A_FILE:
            assert f"fsdp_{field.name}" in fsdp.KEYS, field.name
    for field in dataclasses.fields(ParallelismConfig):
        if field.init and not field.name.endswith("_handler") and not field.name.startswith("_"):
            assert f"parallelism_config_{field.name}" in PARALLELISM, field.name


def models(annotation: Any) -> list[Any]:
    """The pydantic models in a type."""
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models(part)]


def below(model: Any, name: str) -> list[str]:
    """Dotted names of a section's fields, those of sections below it among them."""
    found = []
    for field_name, field in model.model_fields.items():
        inner = models(field.annotation)
        names = {f"{name}.{field.alias or field_name}", f"{name}.{field_name}"}
        found += [part for path in names for part in (below(inner[0], path) if inner else [path])]
    return found


def known(name: str) -> bool:
    """Whether there is an entry, under the name that `canonical` gives it."""
    if any(key.startswith(f"{name}.") for key in json_keys.KEYS):
        return True  # a section, whose keys have entries
    content: Any = {}
    for part in reversed(name.split(".")):
        content = {part: content}
    try:
        changed, _ = json_keys.canonical(content)
    except ConfigError:
        return True  # an old switch, which wants a truth value
    return all(json_keys.entry(path) is not None for path, _, _ in json_keys.parts(changed))


def test_every_field_of_deepspeeds_pydantic_models() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    sections = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    sections |= {"compile": CompileConfig, "tensor_parallel": TPTrainingConfig}
    names = [name for section, model in sections.items() for name in below(model, section)]
    names += [name.removeprefix("monitor.") for name in below(DeepSpeedMonitorConfig, "monitor")]
    assert len(names) > 100
    assert [name for name in names if not known(name)] == []


def test_every_key_that_deepspeed_reads_by_name() -> None:
    """In runtime/config.py, out of `param_dict`."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import config

    def value(node: ast.expr) -> Any:
        return node.value if isinstance(node, ast.Constant) else getattr(config, getattr(node, "id", ""), None)

    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(config))):
        text = ast.unparse(node) if isinstance(node, ast.expr) else ""
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "param_dict":
            found.add(value(node.slice))
        elif isinstance(node, ast.Compare) and text.endswith(("in param_dict", "in param_dict.keys()")):
            found.add(value(node.left))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "param_dict.get":
            found.add(value(node.args[0]))
        elif isinstance(node, ast.Call) and text.startswith("get_scalar_param(param_dict,"):
            found.add(value(node.args[1]))
    found.discard(None)
    assert len(found) >= 30
    assert {name for name in found if name not in json_keys.REMOVED and not known(name)} == set()


def test_removed_keys_are_those_that_deepspeed_stops_at() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import config

    for name in getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", ()):
        assert name in json_keys.REMOVED, name
    for name in getattr(config, "_REMOVED_ZERO_CONFIG_KEYS", ()):
        assert f"zero_optimization.{name}" in json_keys.REMOVED, name


def test_the_aliases_are_deepspeeds() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = {name: field.alias for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias}
    assert theirs.items() <= json_keys.ALIASES.items()


def test_every_entry_says_something() -> None:
    for key, entry in {**ALL, **json_keys.KEYS}.items():
        assert entry.text and not entry.text.endswith("."), key
    assert {folder.DISTRIBUTED_TYPE for folder in catalogue.configs()} == {"NO", "MULTI_GPU", "FSDP", "DEEPSPEED"}


@pytest.mark.parametrize("value", [True, "true", "Yes", "on", 1, "1", "t", "y"])
def test_what_means_yes(value: Any) -> None:
    assert truth(value) is True


@pytest.mark.parametrize("value", [False, "false", "No", "off", 0, "0", "f", "n"])
def test_what_means_no(value: Any) -> None:
    assert truth(value) is False


@pytest.mark.parametrize(
    ("read", "given", "taken"),
    [(whole(), "3", 3), (whole(), 5e8, 500_000_000), (whole(0), 0, 0), (number(), "1.0", 1.0), (number(), 0, 0.0)]
    + [(choice("no", "bf16"), "BF16", "bf16")],
)
def test_what_is_coerced(read: Any, given: Any, taken: Any) -> None:
    assert read(given) == taken and type(read(given)) is type(taken)


@pytest.mark.parametrize(
    ("read", "given"),
    [(truth, 2), (truth, "maybe"), (truth, None), (truth, 0.5), (truth, [True])]
    + [(whole(), value) for value in (0, -1, 1.5, "1.5", True, float("inf"), "", None, 2**70, [1])]
    + [(number(), value) for value in (-1, float("nan"), float("inf"), "none", True, None, {})]
    + [(choice("no", "bf16"), value) for value in (False, "fp8", None, 1)],
)
def test_what_is_not(read: Any, given: Any) -> None:
    with pytest.raises(ConfigError, match="^write "):
        read(given)


def test_what_asks_for_nothing() -> None:
    for value in (None, False, 0, "", "no", "none", "auto", {}, [], {"enabled": False}):
        assert nothing_said(value), value
    for value in (True, 1, 0.5, "x", [0], {"a": 1}):
        assert not nothing_said(value), value
    assert at_most_one(1) and at_most_one("1") and not at_most_one(2) and not at_most_one({"a": 1})
    assert not_enabled({"enabled": "false", "project": "x"}) and not not_enabled({"enabled": 1})
