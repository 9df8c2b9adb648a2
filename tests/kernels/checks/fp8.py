"""The FP8 kernels against torch's own conversion and float64 products of what was quantised."""

import pytest
import torch
from torch import Tensor

from speedrun.kernels import INTERPRETED, fp8, fp8_linear
from speedrun.kernels.fp8_formats import E4M3, E5M2, LARGEST
from tests.kernels.checks import DEVICE, DTYPES, assert_close, random

UNIT_TERMS = 2**12
"""On hardware a sum that is called exact keeps 14 bits within 128 terms (tests/kernels/test_fp8.py imitates that): an
error of 2⁻¹¹ of the sum of magnitudes at most, in the terms of `assert_close`."""


def assert_quantized(q: Tensor, expected: Tensor) -> None:
    """Equal to what torch makes of it, to the bit."""
    assert q.dtype == expected.dtype and q.shape == expected.shape
    assert torch.equal(q.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", (E4M3, E5M2))
@pytest.mark.parametrize("shape", ((1, 1), (1, 100), (130, 70), (64, 128), (80, 48), (33, 48), (56, 16)))
def test_quantize_with_the_current_scale(shape: tuple[int, int], format: torch.dtype, dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype, scale=3.0)
    q, transposed, scale = fp8.quantize(x, 0.0, format, True, "triton")
    expected, _, expected_scale = fp8.quantize(x, 0.0, format, False, "emulated")
    assert torch.equal(scale, expected_scale)  # to the bit: a unit in its last place moves numbers beyond a tie
    assert_quantized(q, expected)
    assert torch.equal(transposed.view(torch.uint8), q.mT.contiguous().view(torch.uint8))


def test_quantize_any_strides() -> None:
    x = random(60, 90)
    for view in (x.mT, x[::3, 1::2], x[:1].expand(9, -1)):
        q, _, _ = fp8.quantize(view, 0.25, E4M3, False, "triton")
        assert_quantized(q, fp8.quantize_reference(view, torch.tensor(0.25, device=DEVICE), E4M3))


@pytest.mark.parametrize("format", (E4M3, E5M2))
@pytest.mark.parametrize("scale", (0.0, 1e-38, 1e-20, 1e30))
def test_zeros_and_tiny_and_huge_numbers(scale: float, format: torch.dtype) -> None:
    x = random(20, 30, scale=scale)
    q, _, chosen = fp8.quantize(x, 0.0, format, False, "triton")
    assert_quantized(q, fp8.quantize_reference(x, chosen, format))
    assert chosen >= fp8.SMALLEST_SCALE and chosen.isfinite() and q.float().isfinite().all()


@pytest.mark.parametrize("format", (E4M3, E5M2))
def test_a_fixed_scale_saturates_and_nan_passes(format: torch.dtype) -> None:
    values = [1.0, 1e30, -1e30, float("inf"), -float("inf"), float("nan")]
    q, _, scale = fp8.quantize(torch.tensor([values], device=DEVICE), 0.5, format, False, "triton")
    limit = LARGEST[format]
    assert scale == 0.5 and q.float()[0, :5].tolist() == [2.0, limit, -limit, limit, -limit]
    assert q.float()[0, 5].isnan()


@pytest.mark.parametrize("format", (E4M3, E5M2))
def test_ties_and_their_neighbours_round_to_even(format: torch.dtype) -> None:
    """Every number of the format, every number halfway between two, and the floats next to those."""
    numbers = torch.arange(256, dtype=torch.uint8).view(format).float()
    numbers = numbers[numbers.isfinite()].unique()
    ties = (numbers[1:] + numbers[:-1]) / 2
    infinity = torch.full_like(ties, float("inf"))
    x = torch.cat([numbers, ties, ties.nextafter(infinity), ties.nextafter(-infinity)])[None].to(DEVICE)
    q, _, _ = fp8.quantize(x, 1.0, format, False, "triton")
    assert_quantized(q, x.clamp(-LARGEST[format], LARGEST[format]).to(format))


def test_nan_is_in_the_current_scale() -> None:
    x = random(70, 70)
    x[3, 68] = float("nan")
    q, _, scale = fp8.quantize(x, 0.0, E4M3, False, "triton")
    assert scale.isnan()


@pytest.mark.parametrize("way", ("triton", "emulated"))
def test_delayed_scales(way: str) -> None:
    """Pass by pass against the definition, in Python's numbers."""
    state, headroom, bootstrap = torch.zeros(2, device=DEVICE), 1.5, 3
    magnitudes = [4.0, 8.0, 2.0, 100.0, 1.0, 0.0]
    before = 0.0
    for step, magnitude in enumerate(magnitudes):
        x = random(30, 70, seed=step).clamp(-1, 1) * magnitude
        x[7, 65] = -magnitude
        q, scale = fp8.quantize_delayed(x, state, headroom, bootstrap, E4M3, way)
        expected = magnitude if step < bootstrap else before * headroom
        assert scale.item() == pytest.approx(expected / 448, rel=1e-6)
        assert state.tolist() == [magnitude, step + 1]
        assert_quantized(q, fp8.quantize_reference(x, scale, E4M3))
        assert q.float().abs().max() <= 448
        before = magnitude


def test_a_state_with_nan_says_so() -> None:
    state = torch.tensor([float("nan"), 20.0], device=DEVICE)
    assert fp8.quantize_delayed(random(3, 3), state, 1.5, 3, E4M3, "triton")[1].isnan()
    x = random(3, 3)
    x[1, 1] = float("nan")
    fp8.quantize_delayed(x, state, 1.5, 3, E4M3, "triton")
    assert state[0].isnan()


@pytest.mark.parametrize("exact", (False, True))
@pytest.mark.parametrize("format", (E4M3, E5M2))
@pytest.mark.parametrize("shape", ((1, 1, 1), (130, 140, 20), (5, 300, 7), (1, 128, 256), (33, 48, 80)))
def test_product(shape: tuple[int, int, int], format: torch.dtype, exact: bool) -> None:
    rows, depth, columns = shape
    a, b = random(rows, depth, dtype=format), random(columns, depth, dtype=E4M3, seed=1)
    scale_a, scale_b = torch.tensor(0.3, device=DEVICE), torch.tensor(0.7, device=DEVICE)
    want = (a.double() @ b.double().mT) * scale_a.double() * scale_b.double()
    size = (a.double().abs() @ b.double().abs().mT) * 0.21
    for dtype in DTYPES:
        result = fp8.product(a, b, scale_a, scale_b, dtype, exact, "triton")
        assert result.dtype == dtype
        assert_close(result, want, size, depth if INTERPRETED else UNIT_TERMS if exact else depth * 2**9)


def test_product_of_a_slice_and_of_huge_scales() -> None:
    a, b = random(20, 90, dtype=E4M3), random(30, 90, dtype=E4M3, seed=1)
    one, huge, tiny = (torch.tensor(value, device=DEVICE) for value in (1.0, 1e30, 1e-30))
    for result, x, w in (
        (fp8.product(a[3:, 10:50], b[:, 10:50], one, one, torch.float32, True, "triton"), a[3:, 10:50], b[:, 10:50]),
        (fp8.product(a, b, huge, tiny, torch.float32, True, "triton"), a, b),
    ):
        size = x.double().abs() @ w.double().abs().mT
        terms = x.shape[1] if INTERPRETED else UNIT_TERMS
        assert_close(result, x.double() @ w.double().mT, size, terms)


def test_nan_passes_through_a_product_by_its_scale_and_by_the_data() -> None:
    a, b = random(4, 8, dtype=E4M3), random(5, 8, dtype=E4M3)
    nan, one = (torch.tensor(value, device=DEVICE) for value in (float("nan"), 1.0))
    assert fp8.product(a, b, nan, one, torch.float32, False, "triton").isnan().all()
    a.view(torch.uint8)[2, 3] = 0x7F
    result = fp8.product(a, b, one, one, torch.float32, False, "triton").isnan()
    assert result[2].all() and not result[[0, 1, 3]].any()


def relative(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None and want is not None
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("layer", ("head", "up", "up relu2", "down"))
def test_layers_agree_with_their_emulation_in_torch(layer: str) -> None:
    """On a GPU it is torch._scaled_mm that is compared. The emulation, on the CPU, is itself held against float64 in
    tests/kernels/test_fp8.py."""
    values = []
    for kernels, device in (("triton", DEVICE), ("torch", "cpu")):
        x, weight = (t.to(device).requires_grad_() for t in (random(3, 11, 48), random(80, 48, seed=1, scale=0.2)))
        if layer == "head":
            y = fp8_linear.head(x, weight, kernels)
        elif layer == "down":
            y = fp8_linear.mlp_down(x, weight, fp8_linear.DelayedScales(), kernels)
        else:
            y = fp8_linear.mlp_up(x, weight, layer == "up relu2", kernels)
        y.backward(random(3, 11, 80, seed=2).to(device))
        values.append([t.detach().cpu() for t in (y, x.grad, weight.grad)])
    for got, want in zip(*values, strict=True):
        assert relative(got, want) < 1e-3


def test_registration() -> None:
    x = random(5, 7)
    torch.library.opcheck(fp8.quantize, (x, 0.0, E4M3, True, "triton"))
    torch.library.opcheck(fp8.quantize_delayed, (x, torch.zeros(2, device=DEVICE), 1.5, 2, E4M3, "triton"))
