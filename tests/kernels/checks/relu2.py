"""relu(x·Wᵀ)² and its gradients against float64."""

import pytest
import torch
from torch import Tensor

from speedrun.kernels import relu2
from tests.kernels.checks import DEVICE, DTYPES, assert_close, random, rounding

SHAPES = [(1, 1, 1), (1, 40, 300), (130, 70, 260), (7, 64, 128), (128, 200, 1), (129, 3, 5)]
"""rows, in, out"""


def check(x: Tensor, weight: Tensor) -> None:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = relu2.linear_relu2(x, weight)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = relu2.linear_relu2_reference(exact_x, exact_w)
    products = x.detach().double().abs() @ weight.detach().double().abs().mT
    assert y.dtype == x.dtype
    # (p + e)² − p² = 2·p·e + e²
    assert_close(y.detach(), exact.detach(), 3 * products * (exact.detach().sqrt() + 1e-6 * products), x.shape[-1])

    upstream = random(*y.shape, dtype=x.dtype, seed=5)
    y.backward(upstream)
    exact.backward(upstream.double())
    u = 2 * exact.detach().sqrt() * upstream.double().abs()
    for got, want, size in (
        (x.grad, exact_x.grad, u.flatten(0, -2) @ exact_w.detach().abs()),
        (weight.grad, exact_w.grad, u.flatten(0, -2).mT @ exact_x.detach().abs().flatten(0, -2)),
    ):
        assert got is not None and want is not None
        # u is rounded to x's dtype before it is multiplied; near p = 0 the root of y is less exact than y
        bound = 2 * rounding(x.dtype) * (want.abs() + size.view_as(want)) + 1e-5 * size.max() + 1e-37
        assert bool(((got.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, depth, columns = shape
    check(random(rows, depth, dtype=dtype), random(columns, depth, dtype=dtype, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_leading_dimensions(dtype: torch.dtype) -> None:
    weight = random(50, 30, dtype=dtype, seed=1)
    check(random(2, 3, 30, dtype=dtype), weight)
    check(random(30, 9, dtype=dtype).mT, random(30, 50, dtype=dtype, seed=1).mT)
    check(random(9, 60, dtype=dtype)[:, ::2], random(100, 31, dtype=dtype)[::2, 1:])


@pytest.mark.parametrize("scale", (0.0, 1e-7, 1e8))
def test_zeros_and_tiny_and_huge_numbers(scale: float) -> None:
    check(random(5, 20, scale=scale), random(12, 20, seed=1))


def test_nan_reaches_its_row_and_backward_leaves_it_to_living_units() -> None:
    x, weight = random(4, 8).requires_grad_(), random(6, 8, seed=1)
    with torch.no_grad():
        x[2, 3] = float("nan")
    y = relu2.linear_relu2(x, weight)
    assert y[2].isnan().all() and not y[[0, 1, 3]].isnan().any()
    dead = torch.tensor([0.0, 4.0, float("nan")], device=DEVICE)
    u = relu2.relu2_backward(dead, torch.tensor([float("nan"), float("nan"), 1.0], device=DEVICE))
    assert u[0] == 0 and u[1].isnan() and u[2].isnan()  # as torch's ReLU: no gradient, NaN or not, where it is off


def test_inside_autocast_it_computes_in_bfloat16_and_gradients_have_the_parameters_dtype() -> None:
    x, weight = random(3, 4, 20).requires_grad_(), random(10, 20, seed=1).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = relu2.linear_relu2(x, weight)
    assert y.dtype == torch.bfloat16 and y.shape == (3, 4, 10)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_registration_and_compile() -> None:
    x, weight = random(3, 5).requires_grad_(), random(4, 5, seed=1).requires_grad_()
    torch.library.opcheck(relu2.linear_relu2_rows, (x, weight))
    torch.library.opcheck(relu2.relu2_backward, (random(3, 5).square(), random(3, 5, seed=2)))
    eager = relu2.linear_relu2(x, weight)
    compiled = torch.compile(relu2.linear_relu2, backend="aot_eager", fullgraph=True)(x, weight)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    for got, want in zip(
        torch.autograd.grad(compiled.sum(), (x, weight)), torch.autograd.grad(eager.sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
