"""X·Xᵀ and b·A + c·A² against float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speedrun.kernels import INTERPRETED, symmetric
from speedrun.optim.orthogonalize import newton_schulz, polar_express
from tests.kernels.checks import DEVICE, DTYPES, assert_close, random

SHAPES = [(1, 1, 1), (2, 130, 70), (1, 128, 64), (3, 5, 200), (1, 1, 300), (1, 257, 1), (2, 61, 129)]
"""matrices, rows, columns; float32 goes by tiles of 64, bfloat16 by tiles of 128"""


def check_gram(x: Tensor) -> None:
    result, exact = symmetric.gram(x), symmetric.gram_reference(x.double())
    assert result.dtype == x.dtype and result.is_contiguous()
    assert_close(result, exact, symmetric.gram_reference(x.double().abs()), x.shape[-1])
    assert torch.equal(result, result.mT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_gram(random(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_symmetric_whatever_the_order_of_the_sums(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix product need not give the same bits for Σ x·y and Σ y·x; here, in the interpreter, no two are alike."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder

        dot = InterpreterBuilder.create_dot

        def uneven(self: Any, *operands: Any) -> Any:
            result = dot(self, *operands)
            rows, columns = result.data.shape
            result.data += 1e-3 * np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
            return result

        monkeypatch.setattr(InterpreterBuilder, "create_dot", uneven)
    x = random(2, 130, 70, dtype=dtype)
    gram = symmetric.gram(x)
    assert torch.equal(gram, gram.mT)
    polynomial = symmetric.polynomial(gram, -2.75, 0.5)
    assert torch.equal(polynomial, polynomial.mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_any_strides(dtype: torch.dtype) -> None:
    x = random(2, 70, 130, dtype=dtype)
    check_gram(x.mT)
    check_gram(x[:, ::2, 3::3])
    check_gram(x[:, 1:, 1:])
    check_gram(x[:1].expand(3, -1, -1))
    check_gram(x[:, :5].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (0.0, 1e-15, 1e15))
def test_gram_of_zeros_and_of_tiny_and_huge_numbers(scale: float, dtype: torch.dtype) -> None:
    check_gram(random(1, 20, 30, dtype=dtype, scale=scale))


def test_nan_reaches_its_row_and_its_column_and_nothing_else() -> None:
    x = random(2, 140, 9)
    x[1, 135, 4] = float("nan")
    result = symmetric.gram(x).isnan()
    expected = torch.zeros_like(result)
    expected[1, 135], expected[1, :, 135] = True, True
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", (1, 60, 129))
def test_polynomial(rows: int, dtype: torch.dtype) -> None:
    a = random(2, rows, rows, dtype=dtype)
    a = (a + a.mT) / 2
    b, c = -2.75, 0.5
    result, exact = symmetric.polynomial(a, b, c), symmetric.polynomial_reference(a.double(), b, c)
    magnitude = symmetric.polynomial_reference(a.double().abs(), -b, c)
    assert_close(result, exact, magnitude, rows)
    assert torch.equal(result, result.mT)


def test_gradients() -> None:
    x, upstream = random(2, 30, 20).requires_grad_(), random(2, 30, 30, seed=1)
    symmetric.polynomial(symmetric.gram(x), -2.0, 0.25).backward(upstream)
    exact = x.detach().double().requires_grad_()
    symmetric.polynomial_reference(symmetric.gram_reference(exact), -2.0, 0.25).backward(upstream.double())
    torch.testing.assert_close(x.grad, exact.grad, rtol=1e-4, atol=1e-3, check_dtype=False)


def test_registration() -> None:
    x = random(1, 9, 7).requires_grad_()
    torch.library.opcheck(symmetric.gram, (x,))
    torch.library.opcheck(symmetric.polynomial, (random(1, 9, 9), 2.0, 0.5))


@pytest.mark.parametrize("orthogonalize", (newton_schulz, polar_express))
@pytest.mark.parametrize("shape", ((2, 48, 130), (1, 130, 48)))
def test_orthogonalisation_by_these_products(orthogonalize, shape: tuple[int, int, int]) -> None:
    x = random(*shape)
    result = orthogonalize(x, 2, dtype=torch.float32, kernels="triton")
    torch.testing.assert_close(result, orthogonalize(x, 2, dtype=torch.float32), rtol=0, atol=1e-4)
    low = orthogonalize(x, 2, dtype=torch.bfloat16, kernels="triton")
    torch.testing.assert_close(low, result, rtol=0, atol=0.03)
    assert result.device.type == DEVICE
