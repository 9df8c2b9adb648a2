"""Where bfloat16 pays: which devices compute in it, and what orthogonalisation therefore runs in.

Most laptops have no bf16 instructions. There a product in bf16 is emulated and takes many times as long as in float32:
on one core with AVX2 Muon's part of a step of `tiny` takes 450 ms in bf16 and 30 in float32.
"""

import os
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist

from speedrun.config import OptimizerConfig

OrthogonalizationDtype = Literal["auto", "bfloat16", "float32"]

WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""The values of ONEDNN_MAX_CPU_ISA that leave no bf16 product to oneDNN, the library that computes torch's on a CPU."""


def native_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether the device multiplies in bf16 itself, and why as a sentence's end.

    A GPU does from compute capability 8.0 on; a processor with AVX512_BF16 or AMX, unless ONEDNN_MAX_CPU_ISA (or
    DNNL_MAX_CPU_ISA, its older name) keeps oneDNN from using them.
    """
    if device.type != "cpu":
        capability = torch.cuda.get_device_capability(device)
        have = "has" if capability >= (8, 0) else "has no"
        return capability >= (8, 0), f"a GPU of capability {capability[0]}.{capability[1]} {have} bf16"
    found = [
        name
        for name, there in (
            ("AMX", torch.cpu._is_amx_tile_supported()),
            ("AVX512_BF16", torch.cpu._is_avx512_bf16_supported()),
        )
        if there
    ]
    if not found:
        return False, "this processor has no bf16 instructions"
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if limit := os.environ.get(variable):
            if limit.upper() in WITHOUT_BF16:
                return False, f"{variable}={limit} forbids this processor's {found[0]}"
            break
    return True, f"this processor has {found[0]}"


def emulated_bf16(device: torch.device) -> str:
    """What a run in bf16 costs where it is emulated, as a line to print; empty where the device computes in it."""
    native, why = native_bf16(device)
    if native:
        return ""
    return (
        f"bf16: emulated here ({why}); with AVX2 a step was measured to take 7 to 20 times as long as in fp32, which "
        "mixed_precision 'no' in the accelerate config trains in"
    )


def emulated_fp16(device: torch.device) -> str:
    """As `emulated_bf16`, of fp16, which every GPU computes in and few processors do (AVX512_FP16)."""
    if device.type != "cpu" or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()):
        return ""
    return "fp16: emulated here (this processor has no AVX512_FP16), many times slower than fp32: for trying it out"


def settle(config: OptimizerConfig, began: OrthogonalizationDtype, device: torch.device) -> tuple[OptimizerConfig, str]:
    """The optimizer's configuration with `orthogonalization_dtype` resolved, and why, as a sentence's end.

    began: what a run that is resumed began with, which it keeps; auto for a new one, which takes the device's.
    """
    if config.orthogonalization_dtype == "auto" and began != "auto":
        return replace(config, orthogonalization_dtype=began), "as the run began"
    dtype, why = choose_dtype(config.orthogonalization_dtype, device)
    return replace(config, orthogonalization_dtype=dtype), why


def agreed(config: OptimizerConfig) -> OptimizerConfig:
    """Rank 0's, on all ranks: hosts may differ, and with them what `auto` has become. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return config
    said = [config]
    dist.broadcast_object_list(said, 0)
    return said[0]


def choose_dtype(asked: OrthogonalizationDtype, device: torch.device) -> tuple[Literal["bfloat16", "float32"], str]:
    """Resolve `optimizer.orthogonalization_dtype`: the dtype's name in torch, and the reason as a sentence's end."""
    if asked != "auto":
        return asked, "as asked"
    native, why = native_bf16(device)
    return "bfloat16" if native else "float32", why
