"""What every key of DeepSpeed's own JSON does here: used, without effect, or refused. Plain Python.

DeepSpeed checks its sections by pydantic and reads the rest by name (runtime/config.py, runtime/constants.py), where a
misspelt key is silence. Here a key without an entry is refused. An entry of a section stands for all keys below it
that have none. Keys are DeepSpeed's canonical names: `canonical` turns its aliases and deprecated spellings into them.
Of what is without effect nothing is passed on. A test walks all keys of the installed DeepSpeed (0.19.8).
"""

from collections.abc import Iterator
from typing import Any

from strategies.config_keys import Key, idle, refused, used
from strategies.config_values import ConfigError, at_most_one, choice, not_enabled, number, short, truth, whole
from strategies.zero.settings import DTYPES

ALIASES = {
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "model_persistence_threshold": "stage3_model_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "module_granularity_threshold": "stage3_module_granularity_threshold",
    "use_all_reduce_for_fetch_params": "stage3_use_all_reduce_for_fetch_params",
    "allgather_sequential": "stage3_allgather_sequential",
}
"""Of zero_optimization: a name that its pydantic model takes → the one used here."""

OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
"""Of zero_optimization: an old switch → the section that took its place."""

REMOVED = (
    *("sparse_gradients", "eigenvalue", "sparse_attention", "elasticity", "graph_harvesting"),
    *("curriculum_learning", "progressive_layer_drop", "amp", "quantize_training"),
    *("nebula", "compression_training"),
    *("zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather"),
    "zero_optimization.zeropp_loco_param",
)
"""Keys that DeepSpeed once had, and now stops at, whatever their value, or no longer reads."""


def _dtype(value: Any) -> str:
    if isinstance(value, str) and value in DTYPES:
        return DTYPES[value]
    raise ConfigError("write fp32, fp16 or bf16")


_sent_as = choice("fp32", "fp16", "bf16")


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError("write a path")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ConfigError("write a list of names")
    return value


def _ratio(value: Any) -> float:
    found = number()(value)
    if found > 1:
        raise ConfigError("write a number from 0 to 1")
    return found


SAVING = idle("for DeepSpeed's checkpoints; Shardrun's have a form of their own")
PRINTING = idle("for what DeepSpeed prints, which is switched off")
GATHERING = {
    "stage3_prefetch_bucket_size": used("elements gathered ahead of use", whole(0)),
    "stage3_param_persistence_threshold": used("elements up to which a parameter stays whole", whole(0)),
    "stage3_model_persistence_threshold": used("elements of all parameters that may stay whole", whole(0)),
    "stage3_max_live_parameters": used("elements that may be gathered at a time", whole(0)),
    "stage3_max_reuse_distance": used("elements within which a parameter that is used again is kept", whole(0)),
    "stage3_module_granularity_threshold": used("modules that are gathered as one", whole(0)),
    "stage3_use_all_reduce_for_fetch_params": used("parameters are gathered by all-reduce", truth),
    "stage3_allgather_sequential": used("parameters are gathered one by one", truth),
}

ZERO: dict[str, Key] = {
    "stage": used("1: optimizer states are partitioned; 2: gradients too; 3: parameters too", whole(0, 3)),
    "contiguous_gradients": used("gradients are copied to one buffer as they come", truth),
    "reduce_scatter": used("gradients are reduced slice by slice, not all-reduced whole", truth),
    "reduce_bucket_size": used("elements of the bucket that is reduced at a time", whole(1)),
    "use_multi_rank_bucket_allreduce": used("the slices of a bucket are all-reduced together", truth),
    "allgather_partitions": idle("DeepSpeed does not read it any more"),
    "allgather_bucket_size": idle("torch has all_gather_into_tensor: a group is gathered in one call"),
    "overlap_comm": used("gradients are reduced while backward goes on; takes a second bucket", truth),
    "compute_grad_norm": refused(
        "remove it: clipping and the record need the norm", lambda value: value in (None, "auto") or _is(value, True)
    ),
    "round_robin_gradients": used("slices are dealt out parameter by parameter", truth),
    "sub_group_size": used("elements that are updated at a time", whole(0)),
    "ignore_unused_parameters": idle("every parameter is used"),
    "parameter_alignment": used("padding between parameters of a flat buffer", truth),
    "zero_hpz_partition_size": used("ranks that hold a second partition of the weights", whole(0)),
    "zero_quantized_weights": used("weights are sent in 8 bits", truth),
    "zero_quantized_gradients": used("gradients are sent in 4 bits", truth),
    "zero_quantized_nontrainable_weights": used("weights are kept in 8 bits", truth),
    "memory_efficient_linear": idle("what a linear layer keeps for backward is the same"),
    **{
        f"leaf_module.{key}": used("modules whose parameters are gathered as one", _texts)
        for key in ("classes", "names", "name_suffixes")
    },
    "legacy_stage1": refused("remove it or write false"),
    "zenflow": refused("remove it"),
    "load_from_fp32_weights": SAVING,
    "elastic_checkpoint": SAVING,
    "stage3_gather_16bit_weights_on_model_save": SAVING,
    "pipeline_loading_checkpoint": SAVING,
    "override_module_apply": idle("nothing is applied to the model's modules once it is partitioned"),
    "log_trace_cache_warnings": PRINTING,
    "enable_sanity_checks": used("true: the ranks compare their lists before every reduction of ZeRO-3", truth),
    "save_muon_momentum_buffer_in_memory": idle("for DeepSpeed's own Muon"),
    "cpu_offload_use_pin_memory": idle(
        "DeepSpeed itself no longer reads it: pin_memory stands in the offload sections"
    ),
    **GATHERING,
    "offload_optimizer.device": used("where master weights and optimizer states lie", choice("none", "cpu", "nvme")),
    "offload_optimizer.ratio": used("share of the optimizer's states that is offloaded", _ratio),
    "offload_optimizer.super_offload": refused("remove it or write false"),
    "offload_optimizer.cpuadam_cores_perc": idle("for super_offload, which is off"),
    "offload_param.device": used("where the parameters lie", choice("none", "cpu", "nvme")),
    "offload_param.buffer_size": used("elements of a buffer on the way to NVMe", whole(0)),
    "offload_param.max_in_cpu": used("elements that stay in host memory", whole(0)),
    **{
        f"{section}.{key}": entry
        for section in ("offload_optimizer", "offload_param")
        for key, entry in {
            "nvme_path": used("the folder on NVMe", _path),
            "buffer_count": used("buffers on the way to NVMe", whole(0)),
            "pin_memory": used("host memory is page-locked, where there is a GPU", truth),
        }.items()
    },
    **{
        f"offload_optimizer.{key}": used("of the way to NVMe", truth)
        for key in ("pipeline_read", "pipeline_write", "fast_init")
    },
}
"""Of the section zero_optimization."""

KEYS: dict[str, Key] = {
    **{f"zero_optimization.{key}": entry for key, entry in ZERO.items()},
    "gradient_accumulation_steps": used("micro-batches of a step", whole()),
    "gradient_clipping": used("the global norm above which gradients are scaled down; 0: never", number()),
    "bf16.enabled": used("true: bf16 weights, float32 masters", truth),
    "bf16.check_grad_overflow": used("whether gradients that are not finite leave a step out", truth),
    "bf16.immediate_grad_update": idle("gradients are taken as backward makes them in any case"),
    "bf16.bf16_master_weights_and_grads": refused("remove it or write false: master weights are float32"),
    "bf16.bf16_optimizer_states": refused("remove it or write false: optimizer states are float32"),
    "fp16.enabled": used("true: fp16 weights, float32 masters, a scaled loss", truth),
    "fp16.loss_scale": used("the loss's factor; 0: it adapts", number()),
    "fp16.initial_scale_power": used("the first factor, as a power of two", whole(0, 64)),
    "fp16.loss_scale_window": used("steps without overflow after which the factor doubles", whole(1)),
    "fp16.hysteresis": used("overflows that are let pass before the factor halves", whole(1)),
    "fp16.consecutive_hysteresis": used("whether those begin anew after a step without one", truth),
    "fp16.min_loss_scale": used("the smallest factor", number()),
    "fp16.auto_cast": idle("the model takes tokens, which are not cast"),
    "fp16.fp16_master_weights_and_grads": refused("remove it or write false: master weights are float32"),
    "torch_autocast": refused("remove it: bf16 or fp16 says the precision", not_enabled),
    "communication_data_type": used("what gradients are sent as", _sent_as),
    "data_types.grad_accum_dtype": used("what gradients add up in", _dtype),
    "data_types.param_dtype": used("must agree with bf16 or fp16", _dtype),
    "data_types.buffer_dtype": idle("the model has no buffers"),
    "data_types.keep_in_fp32_modules": idle("the model has no buffers"),
    "prescale_gradients": used("true: gradients are divided before they are reduced, and not after", truth),
    "gradient_predivide_factor": used(
        "gradients are divided in two steps, before and after they are reduced", number()
    ),
    "gradient_allreduce_op": refused("remove it or write mean", lambda value: value in (None, "auto", "mean")),
    "managed_gradient_accumulation": refused("remove it", lambda value: value in (None, "auto") or _is(value, True)),
    "disable_allgather": idle("DeepSpeed does not read it any more"),
    "aio": used("how files on NVMe are read and written"),
    # what the trainer owns
    "optimizer": refused(
        "remove it: the trainer has its own optimizer, with options --optimizer.*", lambda value: _auto(value)
    ),
    "scheduler": refused(
        "remove it: the trainer has its own schedule, with options --schedule.*", lambda value: _auto(value)
    ),
    "train_batch_size": used("must agree with --data.global-batch", whole()),
    "train_micro_batch_size_per_gpu": used("must agree with the rows of a micro-batch, as --data.micro-batch", whole()),
    "activation_checkpointing.number_checkpoints": used("as --model.checkpointing block", whole(0)),
    "activation_checkpointing.partition_activations": refused("remove it or write false"),
    "activation_checkpointing.cpu_checkpointing": refused("remove it or write false"),
    "activation_checkpointing.contiguous_memory_optimization": refused("remove it or write false"),
    "activation_checkpointing.synchronize_checkpoint_boundary": idle("a matter of time alone"),
    "activation_checkpointing.profile": PRINTING,
    "activation_checkpointing.use_reentrant": idle("blocks are recomputed alike in both ways"),
    "compile.deepcompile": refused("remove it or write false: --compile compiles the model's blocks"),
    "compile.enabled": refused("remove it: --compile compiles the model's blocks"),
    "compile": idle("only read with deepcompile"),
    "wandb": refused("remove it: --log wandb logs the run", not_enabled),
    "tensorboard": refused("remove it: --log wandb logs the run", not_enabled),
    "csv_monitor": refused("remove it: metrics.jsonl has every step", not_enabled),
    "comet": refused("remove it: --log wandb logs the run", not_enabled),
    "fp8": refused("remove it: --model.fp8 computes in FP8", not_enabled),
    "data_efficiency": refused("remove it: the trainer has its own order of data", not_enabled),
    "autotuning": refused("remove it", not_enabled),
    "hybrid_engine": refused("remove it", not_enabled),
    "weight_quantization": refused("remove it"),
    "flops_profiler": refused("remove it: the record has the run's FLOPs", not_enabled),
    "comms_logger": refused("remove it: ledger.json has what is sent", not_enabled),
    "expert_parallel": refused("remove it: the model has no experts", not_enabled),
    "use_data_before_expert_parallelism": idle("the model has no experts"),
    "tensor_parallel.autotp_size": refused("remove it or write 1", at_most_one),
    "tensor_parallel.tp.tp_size": refused("remove it or write 1", at_most_one),
    "tensor_parallel.tp_size": refused("remove it or write 1", at_most_one),
    "tensor_parallel": idle("of tensor parallelism, which is off"),
    "sequence_parallel_size": refused("remove it or write 1", at_most_one),
    "data_parallel_size": refused("remove it: num_processes says how many ranks there are"),
    "seq_parallel_communication_data_type": idle("of sequence parallelism, which is off"),
    "pipeline": idle("the model is no pipeline"),
    "checkpoint": SAVING,
    "datastates_ckpt": SAVING,
    "zero_allow_untested_optimizer": idle("Shardrun's optimizer is let in, whatever this says"),
    "zero_force_ds_cpu_optimizer": idle("the optimizer is Shardrun's, on a CPU too"),
    "dataloader_drop_last": idle("the trainer has a data loader of its own"),
    "vocabulary_size": idle("only for a warning of DeepSpeed's"),
    "disable_python_gc": idle("when Python collects its garbage"),
    "timers": PRINTING,
    "steps_per_print": PRINTING,
    "wall_clock_breakdown": PRINTING,
    "memory_breakdown": PRINTING,
    "dump_state": PRINTING,
    "log_level": PRINTING,
}
"""Dotted key → what it does."""


def _is(value: Any, wanted: bool) -> bool:
    try:
        return truth(value) is wanted
    except ConfigError:
        return False


def _auto(value: Any) -> bool:
    """Whether the engine is left to fill this in: "auto" all through, or nothing."""
    if isinstance(value, dict):
        return all(_auto(part) for part in value.values())
    return value in (None, "auto")


STAGE_3 = (
    *(f"zero_optimization.{name}" for name in (*GATHERING, "sub_group_size", "zero_hpz_partition_size")),
    *(f"zero_optimization.{name}" for name in ("zero_quantized_weights", "zero_quantized_gradients")),
    *(f"zero_optimization.{name}" for name in ("zero_quantized_nontrainable_weights", "enable_sanity_checks")),
    *(f"zero_optimization.leaf_module.{name}" for name in ("classes", "names", "name_suffixes")),
)
"""Keys that stage 3 alone reads."""

SECTIONS = {
    *(name.rpartition(".")[0] for name in KEYS if "." in name),
    "zero_optimization",
    *(name for name, key in KEYS.items() if key.kind != "used"),
    "aio",
}
"""Names under which a mapping may stand."""


def parts(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every value with its dotted name, sections taken apart, and what is wrong with the two of them, if anything is.
    A name with a dot of its own is none of DeepSpeed's; and a section is a mapping.
    """
    for key, value in tree.items():
        name = f"{before}{key}"
        if "." in key:
            yield name, value, "write it as a section, without a dot"
        elif isinstance(value, dict) and value and (name in SECTIONS or any(name.startswith(f"{s}.") for s in OPEN)):
            yield from parts(value, f"{name}.")
        elif name in SECTIONS and name not in KEYS and value is not None and not isinstance(value, dict):
            yield name, value, "write a section with keys of its own"
        else:
            yield name, value, ""


OPEN = tuple(name for name, key in KEYS.items() if key.kind != "used")
"""Sections in which anything may stand, as deep as it likes: refused or without effect as a whole."""


def entry(name: str) -> tuple[str, Key] | None:
    """What a dotted key does: its own entry, or that of a section above it, and that entry's name."""
    while name not in KEYS and "." in name:
        name = name.rpartition(".")[0]
    return (name, KEYS[name]) if name in KEYS else None


def canonical(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """DeepSpeed's settings under the names used here; and of each dotted name that changed, what was written.

    Raises ConfigError where one thing is said twice.
    """
    written: dict[str, tuple[str, Any]] = {}
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = {"bfloat16": "bf16"}.get(key, key)
        if name in found or (name != key and name in content):
            raise ConfigError(f"{name} is written twice, as {key} too; remove one")
        if name != key:
            written[name] = key, value
            parts = value.items() if isinstance(value, dict) else ()
            written |= {f"{name}.{part}": (f"{key}.{part}", said) for part, said in parts}
        found[name] = value
    zero = found.get("zero_optimization")
    if isinstance(zero, dict):
        found["zero_optimization"] = _canonical_zero(zero, written)
    return found, written


def _canonical_zero(zero: dict[str, Any], written: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in zero.items():
        name, content = ALIASES.get(key, key), value
        if key in OFFLOADS:
            name, content = OFFLOADS[key], {"device": "cpu" if _is(value, True) else "none"}
            if not _is(value, True) and not _is(value, False) and value is not None:
                raise ConfigError(f"zero_optimization.{key} {short(value)} is not supported; write true or false")
        if name in found or (name != key and name in zero):
            raise ConfigError(f"zero_optimization.{name} is written twice, as {key} too; remove one")
        if name != key:
            below = ".device" if key in OFFLOADS else ""
            written[f"zero_optimization.{name}{below}"] = f"zero_optimization.{key}", value
        found[name] = content
    return found
