"""RoPE by its defining properties, and its tables against float64."""

import pytest
import torch
from torch import Tensor

from speedrun.model.rope import rope_tables, rotate

CPU = torch.device("cpu")
LENGTH, HEAD_DIM = 40, 16


def rotated_everywhere(vector: Tensor, channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same vector at every position, [LENGTH, HEAD_DIM], rotated."""
    x = vector.to(dtype).expand(1, LENGTH, 1, HEAD_DIM)
    return rotate(x, *rope_tables(LENGTH, channels, 1024.0, CPU, torch.float64))[0, :, 0]


@pytest.mark.parametrize("channels", [HEAD_DIM, HEAD_DIM // 2])
def test_scores_depend_on_distance_alone_and_on_the_true_distance(channels: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, HEAD_DIM, dtype=torch.float64)
    scores = rotated_everywhere(q, channels) @ rotated_everywhere(k, channels).T
    frequencies = [1024 ** -(i / (channels // 2 - 1)) for i in range(channels // 2)]
    a, b = (torch.complex(v[: channels // 2], v[channels // 2 : channels]) for v in (q, k))
    for i in range(LENGTH):
        for j in range(LENGTH):
            # Rotating twice also depends on distance alone, but on the doubled one: hence the value, not only equality.
            turn = torch.exp(1j * (i - j) * torch.tensor(frequencies, dtype=torch.float64))
            expected = (a * turn * b.conj()).real.sum() + q[channels:] @ k[channels:]
            torch.testing.assert_close(scores[i, j], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [HEAD_DIM, HEAD_DIM // 2])
def test_rotation_keeps_lengths_and_the_first_position(channels: int) -> None:
    vector = torch.randn(HEAD_DIM, dtype=torch.float64)
    rotated = rotated_everywhere(vector, channels)
    torch.testing.assert_close(rotated.norm(dim=-1), vector.norm().expand(LENGTH))
    torch.testing.assert_close(rotated[0], vector, rtol=0, atol=0)
    assert not torch.allclose(rotated[1], vector)


def test_half_rope_leaves_the_other_half_of_the_channels_alone() -> None:
    vector = torch.randn(HEAD_DIM, dtype=torch.float64)
    rotated = rotated_everywhere(vector, HEAD_DIM // 2)
    assert (rotated[:, HEAD_DIM // 2 :] == vector[HEAD_DIM // 2 :]).all()
    assert (rotated[1:, : HEAD_DIM // 2] != vector[: HEAD_DIM // 2]).all()


def test_float32_tables_are_accurate_far_into_a_row() -> None:
    exact, tables = (rope_tables(4096, 32, 1024.0, CPU, dtype) for dtype in (torch.float64, torch.float32))
    for wide, narrow in zip(exact, tables, strict=True):  # near 4096 radians, neighbours in float32 are 4.9e-4 apart
        torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-3)


def test_bfloat16_input_is_rotated_in_float32_and_rounded_once() -> None:
    x = torch.randn(2, LENGTH, 3, HEAD_DIM).bfloat16()
    tables = rope_tables(LENGTH, HEAD_DIM, 1024.0, CPU, torch.float32)
    rotated = rotate(x, *tables)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x.float(), *tables).bfloat16())
