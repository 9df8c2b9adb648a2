"""The FP8 kernels against torch's own conversion and float64 products of what was quantised."""

import pytest
import torch
from torch import Tensor

from speedrun.kernels import INTERPRETED, fp8, fp8_linear
from speedrun.kernels.fp8 import E4M3, E5M2, LARGEST
from tests.kernels.checks import DEVICE, DTYPES, assert_close, random

MANTISSA = {E4M3: 7, E5M2: 3}
"""The bits of it, as a mask."""


def assert_quantized(q: Tensor, expected: Tensor) -> None:
    """Equal to what torch makes of it. In the interpreter: at most one number of the format away, two where these
    are subnormal, and where rounding up should have carried into the exponent by up to a factor of two."""
    assert q.dtype == expected.dtype and q.shape == expected.shape
    got, want = q.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    if not INTERPRETED:
        assert torch.equal(got, want)
        return
    subnormal = (want & 0x7F) <= MANTISSA[q.dtype]
    near = (got.int() - want.int()).abs() <= 1 + subnormal.int()
    carried = (want & MANTISSA[q.dtype] == 0) & (q.float().abs() >= expected.float().abs() / 2)
    assert bool((near | carried).all())
    assert len(got.flatten()) < 50 or (got == want).float().mean() > 0.4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", (E4M3, E5M2))
@pytest.mark.parametrize("shape", ((1, 1), (1, 100), (130, 70), (64, 128)))
def test_quantize_with_the_current_scale(shape: tuple[int, int], format: torch.dtype, dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype, scale=3.0)
    q, transposed, scale = fp8.quantize(x, 0.0, format, True, True)
    expected, _, expected_scale = fp8.quantize(x, 0.0, format, False, False)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert_quantized(q, expected)
    assert torch.equal(transposed.view(torch.uint8), q.mT.contiguous().view(torch.uint8))


def test_quantize_any_strides() -> None:
    x = random(60, 90)
    for view in (x.mT, x[::3, 1::2], x[:1].expand(9, -1)):
        q, _, _ = fp8.quantize(view, 0.25, E4M3, False, True)
        assert_quantized(q, fp8.quantize_reference(view, torch.tensor(0.25, device=DEVICE), E4M3))


@pytest.mark.parametrize("format", (E4M3, E5M2))
@pytest.mark.parametrize("scale", (0.0, 1e-38, 1e-20, 1e30))
def test_zeros_and_tiny_and_huge_numbers(scale: float, format: torch.dtype) -> None:
    x = random(20, 30, scale=scale)
    q, _, chosen = fp8.quantize(x, 0.0, format, False, True)
    assert_quantized(q, fp8.quantize_reference(x, chosen, format))
    assert chosen >= fp8.SMALLEST_SCALE and chosen.isfinite() and q.float().isfinite().all()


@pytest.mark.parametrize("format", (E4M3, E5M2))
def test_a_fixed_scale_saturates_and_nan_passes(format: torch.dtype) -> None:
    values = [1.0, 1e30, -1e30, float("inf"), -float("inf"), float("nan")]
    q, _, scale = fp8.quantize(torch.tensor([values], device=DEVICE), 0.5, format, False, True)
    limit = LARGEST[format]
    assert scale == 0.5 and q.float()[0, :5].tolist() == [2.0, limit, -limit, limit, -limit]
    if format == E5M2 or not INTERPRETED:
        assert q.float()[0, 5].isnan()


def test_nan_is_in_the_current_scale() -> None:
    x = random(70, 70)
    x[3, 68] = float("nan")
    q, _, scale = fp8.quantize(x, 0.0, E4M3, False, True)
    assert scale.isnan()


@pytest.mark.parametrize("triton", (True, False))
def test_delayed_scales(triton: bool) -> None:
    """Pass by pass against the definition, in Python's numbers."""
    state, headroom, bootstrap = torch.zeros(2, device=DEVICE), 1.5, 3
    magnitudes = [4.0, 8.0, 2.0, 100.0, 1.0, 0.0]
    before = 0.0
    for step, magnitude in enumerate(magnitudes):
        x = random(30, 70, seed=step).clamp(-1, 1) * magnitude
        x[7, 65] = -magnitude
        q, scale = fp8.quantize_delayed(x, state, headroom, bootstrap, E4M3, triton)
        expected = magnitude if step < bootstrap else before * headroom
        assert scale.item() == pytest.approx(expected / 448, rel=1e-6)
        assert state.tolist() == [magnitude, step + 1]
        if not triton:
            assert torch.equal(q.view(torch.uint8), fp8.quantize_reference(x, scale, E4M3).view(torch.uint8))
        else:
            assert_quantized(q, fp8.quantize_reference(x, scale, E4M3))
        assert q.float().abs().max() <= 448
        before = magnitude


def test_a_state_with_nan_says_so() -> None:
    state = torch.tensor([float("nan"), 20.0], device=DEVICE)
    assert fp8.quantize_delayed(random(3, 3), state, 1.5, 3, E4M3, True)[1].isnan()
    x = random(3, 3)
    x[1, 1] = float("nan")
    fp8.quantize_delayed(x, state, 1.5, 3, E4M3, True)
    assert state[0].isnan()


@pytest.mark.parametrize("exact", (False, True))
@pytest.mark.parametrize("format", (E4M3, E5M2))
@pytest.mark.parametrize("shape", ((1, 1, 1), (130, 140, 260), (5, 300, 7), (1, 128, 256)))
def test_product(shape: tuple[int, int, int], format: torch.dtype, exact: bool) -> None:
    rows, depth, columns = shape
    a, b = random(rows, depth).to(format), random(columns, depth, seed=1).to(E4M3)
    scale_a, scale_b = torch.tensor(0.3, device=DEVICE), torch.tensor(0.7, device=DEVICE)
    want = (a.double() @ b.double().mT) * scale_a.double() * scale_b.double()
    size = (a.double().abs() @ b.double().abs().mT) * 0.21
    for dtype in DTYPES:
        result = fp8.product(a, b, scale_a, scale_b, dtype, exact, True)
        assert result.dtype == dtype
        # on hardware the fast sum keeps about 14 bits of the largest term
        assert_close(result, want, size, depth if exact or INTERPRETED else depth * 2**9)


def test_product_of_a_slice_and_of_huge_scales() -> None:
    a, b = random(20, 90).to(E4M3), random(30, 90, seed=1).to(E4M3)
    one, huge, tiny = (torch.tensor(value, device=DEVICE) for value in (1.0, 1e30, 1e-30))
    sliced = fp8.product(a[3:, 10:50], b[:, 10:50], one, one, torch.float32, True, True)
    torch.testing.assert_close(sliced, a[3:, 10:50].float() @ b[:, 10:50].float().mT, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        fp8.product(a, b, huge, tiny, torch.float32, True, True), a.float() @ b.float().mT, rtol=1e-4, atol=1e-3
    )


def test_nan_passes_through_a_product_by_its_scale() -> None:
    a, b = random(4, 8).to(E4M3), random(5, 8).to(E4M3)
    nan, one = (torch.tensor(value, device=DEVICE) for value in (float("nan"), 1.0))
    assert fp8.product(a, b, nan, one, torch.float32, False, True).isnan().all()
    if not INTERPRETED:  # by the data as well
        a[2, 3] = float("nan")
        result = fp8.product(a, b, one, one, torch.float32, False, True).isnan()
        assert result[2].all() and not result[[0, 1, 3]].any()


def relative(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None and want is not None
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("layer", ("head", "up", "up relu2", "down"))
def test_layers_agree_with_their_emulation_in_torch(layer: str) -> None:
    """The reference is itself held against float64 in tests/kernels/test_fp8.py."""
    values = {}
    for kernels in ("triton", "torch"):
        x, weight = random(3, 11, 48).requires_grad_(), random(80, 48, seed=1, scale=0.2).requires_grad_()
        upstream = random(3, 11, 80, seed=2)
        if layer == "head":
            y = fp8_linear.head(x, weight, kernels)
        elif layer == "down":
            y = fp8_linear.mlp_down(x, weight, fp8_linear.DelayedScales(), kernels)
        else:
            y = fp8_linear.mlp_up(x, weight, layer == "up relu2", kernels)
        y.backward(upstream)
        values[kernels] = (y.detach(), x.grad, weight.grad)
    for got, want in zip(values["triton"], values["torch"], strict=True):
        assert relative(got, want) < (0.15 if INTERPRETED else 1e-3)


def test_registration() -> None:
    x = random(5, 7)
    torch.library.opcheck(fp8.quantize, (x, 0.0, E4M3, True, True))
    torch.library.opcheck(fp8.quantize_delayed, (x, torch.zeros(2, device=DEVICE), 1.5, 2, E4M3, True))
