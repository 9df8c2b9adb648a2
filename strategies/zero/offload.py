"""What DeepSpeed keeps in host memory, by `offload_optimizer` and `offload_param` of its `zero_optimization`.

    offload_optimizer   float32 masters, their gradients and optimizer states lie on the host; the update runs there
    offload_param       ZeRO-3: this rank's cuts of the parameters lie there, and go to the device to be gathered

Plain Python, no torch. The places named are those in DeepSpeed 0.19.8.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from strategies.errors import UserError
from strategies.zero.defaults import accumulates_float32


class Refusal(NamedTuple):
    """A setting that cannot be had: its path in DeepSpeed's configuration, its value, and why, with the way out."""

    key: str
    value: Any
    why: str


def device_of(engine: Mapping[str, Any], part: str) -> str:
    """Where `part` (offload_optimizer or offload_param) lies: "none" (on the GPU), "cpu" or "nvme"."""
    section = (engine.get("zero_optimization") or {}).get(part)
    device = section.get("device") if isinstance(section, Mapping) else None
    return str(device or "none").lower()


def offloads_optimizer(engine: Mapping[str, Any]) -> bool:
    return device_of(engine, "offload_optimizer") != "none"


def offloads_parameters(engine: Mapping[str, Any]) -> bool:
    return device_of(engine, "offload_param") != "none"


def refusals(engine: Mapping[str, Any], precision: str) -> list[Refusal]:
    """What of these settings of DeepSpeed's about offload is not supported, each with its reason; empty where all is.

    engine: DeepSpeed's configuration, `zero_optimization.stage` in it; precision: fp32, bf16 or fp16.
    """
    zero = engine.get("zero_optimization") or {}
    stage = int(zero.get("stage", 0))
    optimizer = zero.get("offload_optimizer") or {}
    found = []
    for part in ("offload_optimizer", "offload_param"):
        if (device := device_of(engine, part)) == "nvme":
            # Stage 3: `_create_fp32_partitions` in stage3.py. Stage 1 and 2 take any device for the CPU (`cpu_offload`
            # in stage_1_and_2.py).
            found.append(
                Refusal(
                    f"zero_optimization.{part}.device",
                    device,
                    "it needs DeepSpeed's async_io, and keeps what lies there in files alone between uses, where "
                    "Shardrun's optimizer, checkpoints and books cannot read it; write cpu",
                )
            )
        elif device not in ("none", "cpu"):
            found.append(Refusal(f"zero_optimization.{part}.device", device, "there is no such device; write cpu"))
    if offloads_parameters(engine) and stage != 3:
        found.append(
            Refusal(
                "zero_optimization.offload_param.device",
                device_of(engine, "offload_param"),
                f"stage {stage} keeps whole parameters on every GPU; remove it, or write stage 3",
            )
        )
    if not offloads_optimizer(engine):
        return found
    if float(optimizer.get("ratio", 1.0)) != 1.0:
        # `_enforce…`, "Hybrid Optimizer Only Supports DeepSpeedCPUAdam" in stage3.py.
        why = "DeepSpeed splits the optimizer between GPU and CPU for its own Adam alone; remove it, or write 1.0"
        found.append(Refusal("zero_optimization.offload_optimizer.ratio", optimizer["ratio"], why))
    if optimizer.get("super_offload"):
        why = "SuperOffload updates with DeepSpeed's own Adam, in other processes; remove it, or write false"
        found.append(Refusal("zero_optimization.offload_optimizer.super_offload", optimizer["super_offload"], why))
    if stage in (1, 2) and accumulates_float32(precision, dict(engine)):
        # `buffer_to_accumulate_to_in_cpu` in stage_1_and_2.py is of the model's dtype.
        why = (
            f"with offload_optimizer stage {stage} adds micro-batches up on the host in the model's dtype all the "
            "same; remove it, or write stage 3"
        )
        found.append(Refusal("data_types.grad_accum_dtype", engine["data_types"]["grad_accum_dtype"], why))
    if stage in (1, 2) and zero.get("compute_grad_norm", True) is False:
        why = "DeepSpeed needs the norm where it offloads the optimizer; remove it, or write true"
        found.append(Refusal("zero_optimization.compute_grad_norm", False, why))
    return found


def check_offload(engine: Mapping[str, Any], precision: str) -> None:
    """Raises ValueError, in one sentence, for the first of `refusals`."""
    for refusal in refusals(engine, precision):
        raise UserError(f"{refusal.key} {refusal.value!r} is not supported: {refusal.why}.")
