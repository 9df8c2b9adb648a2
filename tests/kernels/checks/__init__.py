"""Checks of the Triton kernels against float64, which tests/kernels/test_kernels.py runs in a process of their own.

By hand: TRITON_INTERPRET=1 pytest tests/kernels/checks/relu2.py. The interpreter has to be asked for before Triton is
imported; without it the same checks run on the GPU.

What the interpreter gets wrong by itself, torch does here in its place (`convert_as_hardware`): rounding to nearest,
ties to even, on the way to bfloat16 and FP8, and NaN in e4m3. Around the operands lies NaN, so that a missing mask
shows. What no check in the interpreter can see: how many bits the matrix unit adds FP8 products up with
(tests/kernels/test_fp8.py imitates it), races, and a compiler's mistakes.

**What the first run on a GPU found** (one H100, torch 2.11, Triton 3.6.0; 168 checks passed there, 10 failed, all of
FP8). Explained from the code that Triton 3.6.0 compiles for sm_90; **not yet seen right on hardware**.

- fp8.py::test_product[(130, 140, 260) and (1, 128, 256), both formats, exact], 4 checks, and
  test_product_of_a_slice_and_of_huge_scales: the bound was wrong. The compiled loop is what was meant: four
  QGMMA.64x128x32 for each 128 terms, the first of which starts from zero, a wait, and float32 additions. But inside
  these 128 terms the unit keeps 14 bits, and the bound asked for float32's 24. A unit of 14 bits, imitated, breaks the
  old bound in these five checks and keeps it at (1, 1, 1) and (5, 300, 7), which passed; one of 13 or of 15 bits does
  not fit. (Triton placed the additions before the wait, though, as if the sums were there at once; ptxas 12.8 notices
  and waits. `total += tl.dot(…)` leaves nothing to notice.)
- fp8.py::test_quantize_with_the_current_scale[(130, 70), e4m3, bfloat16]: the reference was wrong. torch multiplies a
  CUDA tensor by the reciprocal where it is divided by a Python number, so its scale was off by a unit in the last
  place; 82 numbers of this tensor lie so near to a tie that they round differently. Both now divide exactly.
- fp8.py::test_quantize_with_the_current_scale[(64, 128), both formats, float32], 2 checks,
  test_layers_agree_with_their_emulation_in_torch[head] and model.py::test_fp8_is_near: the transposed copy was wrong,
  by a fault of ptxas 12.8 (that of Triton 3.6; 12.9 of Triton 3.9 has it right). Two numbers are converted into one
  16-bit register, and for the transpose they were taken apart again; in the SASS the bytes come from registers that
  still hold the float32 input (64 × 128, 80 × 48) or the stack pointer (33 × 48, 33 × 80, 56 × 16). For bfloat16 inputs
  and at 130 × 70 it does not happen, and those passed. The transpose of the head's weight goes into the input
  gradient: NaN bytes in a row of it are NaN in a column there. The PTX is right, executed by hand. Now torch makes the
  transpose, the kernel takes no pair apart, and tests/kernels/test_compile.py watches that.
"""

from typing import Any

import torch
from torch import Tensor

from speedrun.kernels import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16)
AROUND = 4096
"""Elements of NaN before and behind every operand."""


def convert_as_hardware() -> None:
    """Let Triton's interpreter convert floating-point numbers as torch does, which is as the hardware does."""
    import triton.language as tl
    from triton.runtime import interpreter

    dtypes = {
        tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2, tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16, tl.float32: torch.float32,
    }  # fmt: skip
    bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        numbers = torch.from_numpy(data.copy()).view(dtypes[source]).to(dtypes[target])
        return numbers.view(bits[numbers.element_size()]).numpy()

    interpreter._convert_float = convert


if INTERPRETED:
    convert_as_hardware()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normally distributed, the same numbers on every device, with NaN around them in memory. FP8: rounded from
    float32."""
    generator = torch.Generator().manual_seed(seed)
    return guarded((scale * torch.randn(shape, generator=generator)).to(dtype))


def guarded(tensor: Tensor) -> Tensor:
    """The same numbers on the device, contiguous, with NaN before and behind them."""
    buffer = torch.full((tensor.numel() + 2 * AROUND,), float("nan")).to(tensor.dtype).to(DEVICE)
    inside = buffer[AROUND:-AROUND].view(tensor.shape)
    return inside.copy_(tensor)


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of rounding a float32 to `dtype`, and of a few float32 operations before that."""
    return 2.0**-8 if dtype == torch.bfloat16 else 2.0**-21


def assert_close(result: Tensor, exact: Tensor, magnitude: Tensor | float = 0.0, terms: int = 1) -> None:
    """|result − exact| ≤ rounding·|exact| + terms·2⁻²³·magnitude: rounding of a result that was added up in float32
    from so many terms of that magnitude altogether."""
    assert result.shape == exact.shape
    bound = rounding(result.dtype) * exact.abs() + terms * 2.0**-23 * magnitude + 1e-37
    error = (result.double() - exact).abs()
    assert bool((error <= bound).all()), f"off by {error.max():.3g}, {(error / bound).max():.3g} times the bound"
