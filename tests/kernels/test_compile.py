"""The kernels compiled ahead of time for a Hopper GPU (sm_90), without one: instructions, registers, shared memory.

Strides and sizes are compiled as a launch on the record's shapes specialises them: multiples of 16, unit strides.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from speedrun.kernels import INTERPRETED, cross_entropy, fp8_triton, relu2, symmetric  # noqa: E402
from speedrun.kernels.tiles import FLOAT32, Tiles  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET leaves nothing to compile")

SHARED_MEMORY = 227 * 1024
"""Bytes that one program can have on an H100."""


def blocks(tiles: Tiles, together: bool = True) -> dict[str, Any]:
    names = {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "WIDEN": False}
    return names | ({"TOGETHER": tiles.together} if together else {})


def stages(tiles: Tiles) -> dict[str, int]:
    return {"num_warps": tiles.warps, "num_stages": tiles.stages}


FP8_QUANTIZE_TYPES = {
    "scale": "*fp32", "current": "*i32", "largest": "*i32", "state": "*fp32", "fixed": "fp32", "headroom": "fp32",
}  # fmt: skip
FP8_QUANTIZE = {"LIMIT": 448.0, "SMALLEST": 1e-30, "BLOCK": fp8_triton.BLOCK}

KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = {
    "gram": (
        symmetric.symmetric_kernel,
        {"x": "*bf16", "result": "*bf16", "b": "fp32", "c": "fp32"},
        {"stride_column": 1, **blocks(symmetric.TILES, False), "POLYNOMIAL": False},
        stages(symmetric.TILES),
    ),
    "gram of the transpose": (
        symmetric.symmetric_kernel,
        {"x": "*bf16", "result": "*bf16", "b": "fp32", "c": "fp32"},
        {"stride_row": 1, **blocks(symmetric.TILES, False), "POLYNOMIAL": False},
        stages(symmetric.TILES),
    ),
    "polynomial": (
        symmetric.symmetric_kernel,
        {"x": "*bf16", "result": "*bf16", "b": "fp32", "c": "fp32"},
        {"stride_column": 1, **blocks(symmetric.TILES, False), "POLYNOMIAL": True},
        stages(symmetric.TILES),
    ),
    "linear + relu2": (
        relu2.linear_relu2_kernel,
        {"x": "*bf16", "weight": "*bf16", "y": "*bf16"},
        {"stride_x_k": 1, "stride_w_k": 1, **blocks(relu2.TILES)},
        stages(relu2.TILES),
    ),
    "relu2 backward": (
        relu2.relu2_backward_kernel,
        {"y": "*bf16", "gradient": "*bf16", "u": "*bf16"},
        {"BLOCK": relu2.BLOCK},
        {},
    ),
    "cross-entropy": (
        cross_entropy.cross_entropy_kernel,
        {"logits": "*bf16", "targets": "*i64", "shares": "*fp32", "losses": "*fp32", "factor": "*fp32",
         "softcap": "fp32"},
        {"CAP": cross_entropy.SIGMOID.value, "TARGETS": 3, "GRADIENT": True, "BLOCK": cross_entropy.COLUMNS},
        {"num_warps": 8},
    ),
    "largest magnitude": (
        fp8_triton.largest_kernel,
        {"x": "*bf16", "largest": "*i32", "state": "*fp32"},
        {"stride_column": 1, "BOOTSTRAP": 16, "BLOCK": fp8_triton.BLOCK},
        {},
    ),
    "quantise delayed": (
        fp8_triton.quantize_kernel,
        {"x": "*bf16", "q": "*fp8e4nv", **FP8_QUANTIZE_TYPES},
        {"stride_column": 1, **FP8_QUANTIZE, "FIXED": False, "BOOTSTRAP": 16},
        {},
    ),
    "quantise gradient": (
        fp8_triton.quantize_kernel,
        {"x": "*bf16", "q": "*fp8e5", **FP8_QUANTIZE_TYPES},
        {"stride_column": 1, **FP8_QUANTIZE, "LIMIT": 57344.0, "FIXED": False, "BOOTSTRAP": 0},
        {},
    ),
    "quantise float32 weight": (
        fp8_triton.quantize_kernel,
        {"x": "*fp32", "q": "*fp8e4nv", **FP8_QUANTIZE_TYPES},
        {"stride_column": 1, **FP8_QUANTIZE, "FIXED": True, "BOOTSTRAP": 0},
        {},
    ),
}  # fmt: skip

KERNELS["gram, float32"] = (
    symmetric.symmetric_kernel,
    {"x": "*fp32", "result": "*fp32", "b": "fp32", "c": "fp32"},
    {"stride_column": 1, **blocks(FLOAT32, False), "POLYNOMIAL": False},
    stages(FLOAT32),
)
KERNELS["linear + relu2, float32"] = (
    relu2.linear_relu2_kernel,
    {"x": "*fp32", "weight": "*fp32", "y": "*fp32"},
    {"stride_x_k": 1, "stride_w_k": 1, **blocks(FLOAT32)},
    stages(FLOAT32),
)

FP8_PRODUCTS = {
    "fp8 forward": ("fp8e4nv", "bf16", False, False),
    "fp8 forward + relu2": ("fp8e4nv", "bf16", False, True),
    "fp8 input gradient": ("fp8e5", "bf16", True, False),
    "fp8 weight gradient": ("fp8e5", "fp32", True, False),
}
for name, (left, result, exact, square) in FP8_PRODUCTS.items():
    tiles = fp8_triton.EXACT_TILES if exact else fp8_triton.TILES
    KERNELS[name] = (
        fp8_triton.fp8_product_kernel,
        {"a": f"*{left}", "b": "*fp8e4nv", "result": f"*{result}", "scale_a": "*fp32", "scale_b": "*fp32"},
        {**blocks(tiles), "EXACT": exact, "SQUARE": square},
        stages(tiles),
    )


def compiled(name: str) -> Any:
    kernel, types, constants, options = KERNELS[name]
    signature = {
        parameter: "constexpr" if parameter in constants else types.get(parameter, "i32")
        for parameter in kernel.arg_names
    }
    sizes = [i for i, p in enumerate(kernel.arg_names) if signature[p][0] in "*i" and p not in ("vocab_size",)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in sizes}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_for_hopper_and_spills_no_register(name: str, tmp_path: Path) -> None:
    kernel = compiled(name)
    assert kernel.metadata.shared <= SHARED_MEMORY
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # What does not fit into registers lives on the thread's stack.
    assert re.search(r"STACK:0 .*LOCAL:0 ", usage), usage
    products = re.findall(r"wgmma\.mma_async\S*", kernel.asm["ptx"])
    if name in FP8_PRODUCTS:
        left = "e5m2" if "gradient" in name else "e4m3"
        assert products and all(p.endswith(f".f32.{left}.e4m3") for p in products), set(products)
    elif "float32" in name:
        assert not products and "tf32" not in kernel.asm["ptx"]
    elif "BLOCK_M" in KERNELS[name][2]:
        assert products and all(p.endswith(".f32.bf16.bf16") for p in products), set(products)


@pytest.mark.parametrize("name", ("quantise delayed", "quantise gradient", "quantise float32 weight"))
def test_a_converted_pair_is_never_taken_apart(name: str) -> None:
    """Two numbers become one 16-bit register. Where its upper byte is used alone while the pair is stored as well,
    ptxas 12.8 (Triton 3.6) takes that byte from registers with something else (checks/__init__.py tells the story)."""
    ptx = compiled(name).asm["ptx"]
    pairs = re.findall(r"cvt\.rn\.satfinite\.\S+\s+(%rs\d+)", ptx)
    assert len(pairs) >= 16
    assert not [pair for pair in pairs if re.search(rf"shr\.u16\s+%rs\d+, {pair},", ptx)]


def test_the_exact_fp8_product_adds_up_outside_of_the_matrix_unit() -> None:
    """Each tile's first instruction starts from zero, and float additions follow, after the wait for the tile: no sum
    of more than 128 terms in 14 bits."""
    exact, fast = (compiled(name).asm["ptx"] for name in ("fp8 weight gradient", "fp8 forward"))
    assert exact.count("add.f32") >= 64 and fast.count("add.f32") == 0
    loop = exact[exact.index("wgmma.fence") : exact.rindex("add.f32")]
    assert loop.index("wgmma.wait_group") < loop.index("add.f32")
