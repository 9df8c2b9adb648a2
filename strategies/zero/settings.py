"""DeepSpeed's settings of memory and traffic, one by one: which the books follow, which not, and which cannot run here.

Keys as in DeepSpeed's JSON, sections before a dot, under one spelling each (`stage3_…`). Offload, precision and what
the trainer sets itself (optimizer, batch sizes) are not here. Plain Python, no torch. As DeepSpeed 0.19.8 reads them.
"""

from collections.abc import Mapping
from typing import Any

ZERO = "zero_optimization."

DTYPES = {
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "fp32"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
}
"""DeepSpeed's names of a dtype (`DtypeEnum` in runtime/config.py) → ours."""

EXACT = {
    ZERO + "reduce_bucket_size": "elements of the gradients' buffer, and of one reduction",
    ZERO + "contiguous_gradients": "false: no such buffer; gradients are flattened for every reduction",
    ZERO + "overlap_comm": "true: a second such buffer under ZeRO-1 and -2",
    ZERO + "reduce_scatter": "false: gradients are all-reduced as they are",
    ZERO + "use_multi_rank_bucket_allreduce": "false: each slice is reduced to the rank that needs it",
    ZERO + "round_robin_gradients": "parameters lie in another order in ZeRO-1 and -2's flat buffers",
    ZERO + "parameter_alignment": "parameters begin at multiples of 16 bytes in ZeRO-1 and -2's flat buffers",
    ZERO + "sub_group_size": "ZeRO-3 updates pieces of this many elements",
    ZERO + "stage3_max_live_parameters": "ZeRO-3 fetches nothing ahead beyond so many elements",
    ZERO + "stage3_max_reuse_distance": "ZeRO-3 keeps what is used again within so many elements",
    ZERO + "stage3_prefetch_bucket_size": "ZeRO-3 fetches so many elements ahead",
    ZERO + "stage3_param_persistence_threshold": "parameters of at most so many elements stay whole",
    ZERO + "stage3_model_persistence_threshold": "so many elements stay whole at most",
    ZERO + "stage3_allgather_sequential": "true: one all-gather per parameter",
    ZERO + "stage3_use_all_reduce_for_fetch_params": "true: parameters are fetched by all-reduce",
    ZERO + "enable_sanity_checks": "true: the ranks compare their lists before every reduction of ZeRO-3",
    "communication_data_type": "gradients travel in this dtype",
    "data_types.grad_accum_dtype": "gradients are added up in this dtype",
    "prescale_gradients": "true: gradients are divided before they are reduced, and not after",
    "gradient_predivide_factor": "gradients are divided in two steps, before and after they are reduced",
    "bf16.check_grad_overflow": "false: no flag is all-reduced before an update of ZeRO-1 and -2",
}
"""Key → what it does: predicted, to the byte."""

NO_EFFECT = {
    ZERO + "allgather_bucket_size": "torch has all_gather_into_tensor: a group is gathered in one call",
    ZERO + "allgather_partitions": "DeepSpeed does not read it any more",
    ZERO + "ignore_unused_parameters": "every parameter is used",
    ZERO + "load_from_fp32_weights": "Shardrun's checkpoints are its own",
    ZERO + "elastic_checkpoint": "Shardrun's checkpoints are its own",
    ZERO + "pipeline_loading_checkpoint": "Shardrun's checkpoints are its own",
    ZERO + "stage3_gather_16bit_weights_on_model_save": "Shardrun's checkpoints are its own",
    ZERO + "memory_efficient_linear": "what a linear layer keeps is the same",
    ZERO + "override_module_apply": "weights are made before the model is partitioned",
    ZERO + "log_trace_cache_warnings": "a matter of the log",
    ZERO + "save_muon_momentum_buffer_in_memory": "for DeepSpeed's own Muon",
    "bf16.immediate_grad_update": "DeepSpeed does so in any case",
    "data_types.buffer_dtype": "the model has no buffers",
    "data_types.keep_in_fp32_modules": "the model has no buffers",
    "disable_allgather": "DeepSpeed does not read it any more",
    "seq_parallel_communication_data_type": "no sequence is spread over ranks",
    "use_data_before_expert_parallelism": "there are no experts",
    "checkpoint.use_node_local_storage": "Shardrun's checkpoints are its own",
}
"""Key → why it changes neither memory nor traffic nor mathematics here."""

NOT_PREDICTED: dict[str, tuple[Any, tuple[str, ...]]] = {
    ZERO + "leaf_module": ({}, ("parameters", "all_gather", "reduce_scatter", "all_reduce")),
    ZERO + "stage3_module_granularity_threshold": (0, ("parameters", "all_gather", "reduce_scatter", "all_reduce")),
    ZERO + "zero_hpz_partition_size": (1, ("parameters", "all_gather")),
    ZERO + "zero_quantized_weights": (False, ("parameters", "all_gather")),
    ZERO + "zero_quantized_nontrainable_weights": (False, ("parameters", "all_gather")),
    ZERO + "zero_quantized_gradients": (False, ("reduce_scatter", "all_to_all")),
}
"""Key → the value that changes nothing, and what it changes in the books otherwise: categories of memory, collectives.
All of ZeRO-3; ZeRO-1 and -2 do not read them."""

_REMOVED = "DeepSpeed has removed it"
_MASTERS = "the weights that the optimizer updates are float32 under every strategy here; remove it"
CANNOT_RUN: dict[str, tuple[Any, str]] = {
    ZERO + "legacy_stage1": (False, "DeepSpeed has removed its first ZeRO-1; remove it"),
    ZERO + "compute_grad_norm": (True, "every step reports its gradient norm; remove it"),
    ZERO + "zenflow": (None, "it needs an optimizer of DeepSpeed's own; remove it"),
    ZERO + "mics_shard_size": (-1, f"{_REMOVED}; fsdp.yaml with replicas (hsdp.yaml) shards within groups of ranks"),
    ZERO + "mics_hierarchical_params_gather": (False, f"{_REMOVED}; remove it"),
    ZERO + "zeropp_loco_param": (None, f"{_REMOVED}; remove it"),
    "bf16.bf16_master_weights_and_grads": (False, _MASTERS),
    "bf16.bf16_optimizer_states": (False, _MASTERS),
    "gradient_allreduce_op": ("mean", "every strategy averages gradients over ranks here; remove it"),
    "managed_gradient_accumulation": (True, "the training loop counts micro-batches by it; remove it"),
}
"""Key → the value that is as good as silence, and why no other can run here, with the way out."""


def value(engine: Mapping[str, Any], key: str) -> Any:
    """What DeepSpeed's JSON says under a dotted key; None where it says nothing."""
    section, _, name = key.rpartition(".")
    found = (engine.get(section) or {}).get(name) if section else engine.get(name)
    return None if found == "auto" else found


def unpredicted(stage: int, precision: str, engine: Mapping[str, Any]) -> dict[str, str]:
    """Line of the books (a category of memory, a collective) → the key for which it is not predicted."""
    lines: dict[str, str] = {}
    if stage == 3:
        for key, (neutral, changed) in NOT_PREDICTED.items():
            if value(engine, key) not in (None, neutral, 0):
                for line in changed:
                    lines.setdefault(line, key)
    if stage == 1 and (accumulates := value(engine, "data_types.grad_accum_dtype")):
        own = {"fp32": "fp32", "bf16": "bf16"}.get(precision, "fp16")
        # Gradients are added up in tensors of another dtype, which live in the bucket for a while. (float32 under bf16
        # is another class of DeepSpeed's, and predicted.)
        if DTYPES[accumulates] != own and (precision, DTYPES[accumulates]) != ("bf16", "fp32"):
            lines |= dict.fromkeys(("gradients", "communication buffers"), "data_types.grad_accum_dtype")
    return lines


def zero_refusal(
    stage: int, precision: str, engine: Mapping[str, Any], ranks: int, cpu: bool = False
) -> tuple[str, str] | None:
    """The first setting that cannot run here, and why, with the way out; None where all can.

    stage: 1, 2 or 3; ranks: of the launch; cpu: whether it is one on CPUs, which have no kernels to quantize.
    """
    for key, (neutral, why) in CANNOT_RUN.items():
        if value(engine, key) not in (None, neutral, {}, []):
            return key, why
    for key in ("data_types.grad_accum_dtype", "data_types.param_dtype"):
        if (named := value(engine, key)) and named not in DTYPES:
            return key, "DeepSpeed has no such dtype; write fp32, bf16 or fp16"
    for key in ("communication_data_type", "seq_parallel_communication_data_type"):
        if (named := value(engine, key)) and str(named).lower() not in ("fp32", "bf16", "fp16"):
            return key, "DeepSpeed has no such dtype; write fp32, bf16 or fp16"
    if (named := value(engine, "data_types.param_dtype")) and DTYPES[named] != precision:
        return "data_types.param_dtype", f"the model computes in {precision}; remove it, or write {precision}"
    if stage < 3 and (size := value(engine, ZERO + "allgather_bucket_size")) and int(size) % 2:
        return ZERO + "allgather_bucket_size", "DeepSpeed wants an even number; write one"
    if (size := value(engine, ZERO + "zero_hpz_partition_size")) and stage == 3 and ranks % min(int(size), ranks):
        return ZERO + "zero_hpz_partition_size", f"it does not divide {ranks} ranks; write one that does"
    for kind in ("weights", "nontrainable_weights", "gradients"):
        if cpu and stage == 3 and value(engine, f"{ZERO}zero_quantized_{kind}"):
            return f"{ZERO}zero_quantized_{kind}", "its kernels need a GPU; remove it"
    scatters = value(engine, ZERO + "reduce_scatter") is not False
    if stage > 1 and scatters and value(engine, "prescale_gradients"):
        return "prescale_gradients", f"ZeRO-{stage} takes it with reduce_scatter: false only; remove it, or write that"
    factor = value(engine, "gradient_predivide_factor")
    if factor not in (None, 1):
        if stage == 2 and scatters:
            return "gradient_predivide_factor", "ZeRO-2 takes it with reduce_scatter: false only; remove it"
        if stage == 3:  # `__avg_scatter_grads` does not multiply back where the factor is the number of ranks
            return "gradient_predivide_factor", "ZeRO-3 does not average with it in every case; remove it"
    return None
