"""Orthogonalisation against the singular value decomposition in float64, and against torch's own Muon."""

import pytest
import torch
from torch import Tensor

from speedrun.optim.orthogonalize import POLAR_EXPRESS, newton_schulz, polar_express

BOTH = pytest.mark.parametrize("orthogonalize", (newton_schulz, polar_express))
SHAPES = pytest.mark.parametrize("shape", ((48, 48), (101, 48), (48, 101), (1, 9), (9, 1), (1, 1)))

INTERVALS = {newton_schulz: (0.47, 1.21), polar_express: (0.847, 1.141)}
"""Where singular values of at least 0.001 end after five iterations, as published."""


def random_matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(shape: tuple[int, int], values: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(random_matrix(shape), full_matrices=False)
    return u * values @ vh


def polar_factor(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


@BOTH
def test_singular_values_end_in_the_published_interval(orthogonalize) -> None:  # type: ignore[no-untyped-def]
    # From 0.001 up to what a Frobenius norm of one allows: a geometric series, or a single large one among small ones.
    series = 0.001 * 1.155 ** torch.arange(48, dtype=torch.float64)
    lonely = torch.cat([torch.ones(1, dtype=torch.float64), torch.full((47,), 0.0011, dtype=torch.float64)])
    for values in (series, lonely):
        values = values / values.square().sum().sqrt()
        matrix = with_singular_values((101, 48), values)
        result = orthogonalize(matrix[None], dtype=torch.float64)[0]
        # In the matrix's own singular vectors, so that each value is seen to come from its own.
        u, before, vh = torch.linalg.svd(matrix, full_matrices=False)
        after = (u.mT @ result @ vh.mT).diagonal()
        after = after[before >= 0.001 * 1.021]  # Polar Express divides by the norm times 1.02
        assert len(after) > 40
        low, high = INTERVALS[orthogonalize]
        assert after.min() >= low and after.max() <= high, (after.min(), after.max())


def test_newton_schulz_needs_0_001_to_reach_its_interval_and_never_converges() -> None:
    values = torch.cat([torch.tensor([0.001]), torch.linspace(0.01, 0.999, 400)]).double()
    after = newton_schulz(diagonal_of(values), dtype=torch.float64)[:, 0, 0]
    assert after[0] == pytest.approx(0.4705, abs=1e-3)
    assert 0.68 < after[1:].min() < 0.70 and 1.12 < after[1:].max() < 1.14


def diagonal_of(values: Tensor) -> Tensor:
    """Matrices [n, 2, 2] of Frobenius norm one, the first singular value given."""
    return torch.diag_embed(torch.stack([values, (1 - values**2).sqrt()], dim=-1))


def test_polar_express_repeats_its_last_quintic_and_converges() -> None:
    matrix = random_matrix((20, 12))
    few, many = (polar_express(matrix[None], steps, torch.float64)[0] for steps in (5, 9))
    values = torch.linalg.svdvals(many)
    assert (many - polar_factor(matrix)).norm() < (few - polar_factor(matrix)).norm()
    a, b, c = POLAR_EXPRESS[-1]
    x = torch.linalg.svdvals(polar_express(matrix[None], 8, torch.float64)[0]).sort().values
    assert torch.allclose((a * x + b * x**3 + c * x**5).sort().values, values.sort().values)


@BOTH
@SHAPES
def test_the_result_points_along_the_polar_factor(orthogonalize, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    matrix = random_matrix(shape)
    result = orthogonalize(matrix[None], dtype=torch.float64)[0]
    assert result.shape == shape and result.dtype == torch.float64
    polar = polar_factor(matrix)
    cosine = (result * polar).sum() / (result.norm() * polar.norm())
    assert cosine > 0.97
    # The singular vectors stay: both products with the input are symmetric.
    for product in (result.mT @ matrix, result @ matrix.mT):
        torch.testing.assert_close(product, product.mT, rtol=0, atol=1e-9)


@BOTH
@SHAPES
def test_the_transpose_gives_the_transpose_and_scale_does_not_matter(orthogonalize, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    matrix = random_matrix(shape)
    result = orthogonalize(matrix[None], dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(matrix.mT[None], dtype=torch.float64), result.mT, rtol=0, atol=1e-9)
    torch.testing.assert_close(orthogonalize(1e4 * matrix[None], dtype=torch.float64), result, rtol=1e-4, atol=1e-4)


@BOTH
def test_a_zero_matrix_stays_zero(orthogonalize) -> None:  # type: ignore[no-untyped-def]
    assert torch.equal(orthogonalize(torch.zeros(2, 5, 3)), torch.zeros(2, 5, 3))


@BOTH
@SHAPES
def test_a_batch_is_a_loop(orthogonalize, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    batch = torch.stack([random_matrix(shape, seed) for seed in range(3)])
    loop = torch.cat([orthogonalize(matrix[None], dtype=torch.float64) for matrix in batch])
    torch.testing.assert_close(orthogonalize(batch, dtype=torch.float64), loop, rtol=0, atol=1e-12)


@BOTH
def test_lower_precisions_are_close_and_keep_the_inputs_dtype(orthogonalize) -> None:  # type: ignore[no-untyped-def]
    matrix = random_matrix((101, 48))
    exact = orthogonalize(matrix[None], dtype=torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        result = orthogonalize(matrix[None].float(), dtype=dtype)
        assert result.dtype == torch.float32
        error = (result.double() - exact).norm() / exact.norm()
        assert error < tolerance
        assert dtype == torch.float32 or error > 1e-3, "that was not computed in bfloat16"


@SHAPES
def test_torchs_muon_takes_the_same_step(shape: tuple[int, int]) -> None:
    """torch.optim.Muon without momentum: its Newton–Schulz in bfloat16, times √max(1, rows / columns)."""
    gradient = random_matrix(shape).float()
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    ours = newton_schulz(gradient[None], dtype=torch.bfloat16)[0] * max(1.0, shape[0] / shape[1]) ** 0.5
    assert (weight.detach() + ours).norm() / ours.norm() < 0.02


@pytest.mark.parametrize(("ranks", "error"), ((2, 0.45), (4, 0.64), (8, 0.78)))
def test_orthogonalising_shards_is_not_a_piece_of_orthogonalising_the_matrix(ranks: int, error: float) -> None:
    """Why Muon needs whole matrices: eight ranks that each orthogonalise the rows they hold are 78 % off.

    Cut a matrix into blocks of rows. A block's update has singular values of one, and so have the same rows of the
    whole matrix's update, but along other directions: a block cannot know which of its directions the other blocks
    share, and those come out √ranks times too large, at the cost of the rest. The singular values fall as 1, 1/2,
    1/3 …, as a gradient's do: a few directions dominate.
    """
    matrix = with_singular_values((48, 48), 1 / torch.arange(1, 49, dtype=torch.float64))
    whole = polar_factor(matrix)
    shards = torch.cat([polar_factor(block) for block in matrix.chunk(ranks)])
    assert (shards - whole).norm() / whole.norm() == pytest.approx(error, abs=0.02)
