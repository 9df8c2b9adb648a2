"""The cross-entropy without logits against the one with them, in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from speedrun.kernels import cross_entropy as module
from speedrun.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from tests.kernels.checks import DEVICE, DTYPES, random

SHAPES = [(1, 1, 1, 1), (1, 8, 5, 8), (13, 40, 101, 104), (9, 16, 4097, 4100)]
"""targets, width, words, rows of the head: one block of columns and two, with and without padding"""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "ROWS", 8)
    yield


def case(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, ...]:
    count, width, words, rows = shape
    targets = torch.randint(0, words, (count,), generator=torch.Generator().manual_seed(9)).to(DEVICE)
    targets[2::5] = -1
    hidden, weight = random(count, width, dtype=dtype, scale=scale), random(rows, width, dtype=dtype, seed=1)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    words: int,
    cap: float,
    reduction: str,
    factor: float,
    **further: Any,
) -> None:
    loss = cross_entropy(hidden, weight, targets, words, cap, reduction, **further)
    exact_h, exact_w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact = cross_entropy_reference(exact_h, exact_w, targets, words, cap, reduction, **further)
    low = hidden.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-2 if low else 1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, weight, targets, words, cap, reduction, **further), loss)
    (factor * loss).backward()
    (factor * exact).backward()
    for got, want in ((hidden.grad, exact_h.grad), (weight.grad, exact_w.grad)):
        assert got is not None and want is not None
        error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
        assert error < (3e-2 if low else 1e-5), error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(*case(shape, dtype), words=shape[2], cap=15.0, reduction="mean", factor=1.0)


@pytest.mark.parametrize(
    ("cap", "reduction", "factor"), [(0.0, "mean", 3.5), (5.0, "sum", 3.5), (0.0, "sum", -1e-3), (5.0, "mean", 65536.0)]
)
def test_it_honours_the_gradient_of_the_loss(cap: float, reduction: str, factor: float) -> None:
    check(*case(SHAPES[2]), words=101, cap=cap, reduction=reduction, factor=factor)


@pytest.mark.parametrize(
    ("cap", "form", "future", "dtype"),
    [
        (23.0, "sigmoid", (), torch.float32),
        (23.0, "sigmoid", (0.5, 0.25), torch.float32),
        (23.0, "sigmoid", (0.5, 0.25), torch.bfloat16),
        (15.0, "tanh", (0.5, 0.25), torch.float32),
        (15.0, "tanh", (0.0,), torch.bfloat16),
        (0.0, "sigmoid", (0.5, 0.25), torch.float32),
        (0.0, "sigmoid", (), torch.bfloat16),
    ],
)
def test_several_targets_a_row_and_both_softcaps(
    cap: float, form: str, future: tuple[float, ...], dtype: torch.dtype
) -> None:
    """Rows without a next token but with a later one, and the other way round, among them."""
    shape = SHAPES[2]
    hidden, weight, targets = case(shape, dtype, scale=3.0)
    if future:
        chance = torch.Generator().manual_seed(4)
        more = torch.randint(-1, shape[2], (shape[0], len(future)), generator=chance).to(DEVICE)
        more[::3] = -1
        more[1::4, 0] = targets[1::4]  # the same word twice
        targets = torch.cat([targets[:, None], more], dim=1)
    check(hidden, weight, targets, shape[2], cap, "mean", 2.5, form=form, future=future)
    assert weight.grad is not None and weight.grad.abs().max() > 1e-3


def test_a_later_target_that_is_no_word_is_heard_of() -> None:
    hidden, weight, targets = case(SHAPES[2])
    targets = targets[:, None].repeat(1, 3)
    targets[0, 2] = 101
    assert cross_entropy(hidden, weight, targets, 101, 15.0, future=(0.5, 0.25)).isnan()


@pytest.mark.parametrize(("scale", "cap"), [(0.0, 15.0), (1e-20, 0.0), (1e3, 0.0), (1e3, 15.0)])
def test_zeros_and_tiny_and_huge_numbers(scale: float, cap: float) -> None:
    hidden, weight, targets = case(SHAPES[2], scale=scale)
    if scale == 1e3 and cap:  # the softcap is flat out there: gradients vanish, in float32 a little earlier
        loss = cross_entropy(hidden, weight, targets, 101, cap)
        exact = cross_entropy_reference(hidden.double(), weight.double(), targets, 101, cap, "mean")
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    else:
        check(hidden, weight, targets, 101, cap, "mean", 1.0)


def test_strides_and_leading_dimensions() -> None:
    _, weight, targets = case((12, 40, 101, 104))
    hidden = random(40, 24).mT[::2].unflatten(0, (3, 4)).requires_grad_()
    check(hidden, weight.detach().mT.contiguous().mT.requires_grad_(), targets.view(4, 3).mT, 101, 15.0, "mean", 1.0)


def test_the_largest_logit_may_be_in_a_later_block_of_columns() -> None:
    hidden, weight, targets = case(SHAPES[3])
    with torch.no_grad():
        weight[4096] *= 30
    check(hidden, weight, targets, 4097, 0.0, "mean", 1.0)


def test_padding_gets_no_gradient_and_no_probability() -> None:
    hidden, weight, targets = case(SHAPES[2])
    with torch.no_grad():
        weight[101:] = 1e4
    check(hidden, weight, targets, 101, 0.0, "mean", 1.0)
    assert weight.grad is not None and not weight.grad[101:].any() and weight.grad[:101].any()


def test_without_a_target() -> None:
    hidden, weight, targets = case(SHAPES[2])
    targets.fill_(-1)
    assert cross_entropy(hidden, weight, targets, 101, 15.0, "mean").isnan()
    loss = cross_entropy(hidden, weight, targets, 101, 15.0, "sum")
    loss.backward()
    assert loss == 0 and hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("word", (101, 5000, -2))
def test_a_target_that_is_no_word_is_heard_of(word: int) -> None:
    hidden, weight, targets = case(SHAPES[2])
    targets[0] = word
    assert cross_entropy(hidden, weight, targets, 101, 15.0).isnan()


def test_nan_stays_in_its_row_and_reaches_the_loss() -> None:
    hidden, weight, targets = case(SHAPES[2])
    with torch.no_grad():
        hidden[3, 1] = float("nan")  # has a target
        hidden[2, 1] = float("nan")  # has none
    loss = cross_entropy(hidden, weight, targets, 101, 15.0)
    loss.backward()
    assert loss.isnan() and hidden.grad is not None
    assert hidden.grad[3].isnan().all() and not hidden.grad[[i for i in range(13) if i != 3]].isnan().any()


def test_logits_never_exist_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    losses = module._losses
    monkeypatch.setattr(module, "_losses", lambda logits, *rest, **options: (
        seen.append(logits.shape), losses(logits, *rest, **options))[1])  # fmt: skip
    hidden, weight, targets = case(SHAPES[2])
    cross_entropy(hidden, weight, targets, 101, 15.0).backward()
    assert seen == [(8, 104), (5, 104)]


def test_registration_and_compile() -> None:
    hidden, weight, targets = case((5, 6, 7, 8))
    rest = (targets[:, None], [1.0], 7, 15.0, "tanh", True)
    torch.library.opcheck(module.loss_only, (hidden.detach(), weight.detach(), *rest))
    torch.library.opcheck(
        module.loss_and_gradients,
        (hidden, weight, *rest, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    eager, loss = (f(hidden, weight, targets, 7, 15.0) for f in (cross_entropy, compiled))
    assert eager == loss
    for got, want in zip(
        torch.autograd.grad(2 * loss, (hidden, weight)), torch.autograd.grad(2 * eager, (hidden, weight)), strict=True
    ):
        assert torch.equal(got, want)


def test_in_fp8_it_is_near() -> None:
    hidden, weight, targets = case((21, 48, 101, 112), torch.bfloat16)
    weight = (weight.detach() * 0.1).requires_grad_()
    loss = cross_entropy(hidden, weight, targets, 101, 15.0, fp8=True)
    (5 * loss).backward()
    near_h, near_w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    near = cross_entropy_reference(near_h, near_w, targets, 101, 15.0, "mean")
    (5 * near).backward()
    assert abs(loss.item() - near.item()) < 0.05
    for got, want in ((hidden.grad, near_h.grad), (weight.grad, near_w.grad)):
        assert got is not None and want is not None
        assert (got.double() - want).norm() / want.norm() < 0.15
    with torch.no_grad():  # validation is not in FP8
        plain = cross_entropy(hidden, weight, targets, 101, 15.0, fp8=True)
    assert torch.equal(plain, cross_entropy(hidden.detach(), weight.detach(), targets, 101, 15.0))
