"""Random numbers by their place, against Philox in whole numbers and the normal distribution of Python's statistics."""

import hashlib
import statistics

import numpy as np
import pytest
import torch

from speedrun.config import ModelConfig
from speedrun.model import GPT, parameter_shapes
from speedrun.model.random_stream import normal, uniform
from speedrun.presets import PRESETS

MASK = 2**64 - 1


def philox(counter: int, key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x64-10 as its authors write it down."""
    x = (counter, 0, 0, 0)
    for step in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        keys = [(k + step * weyl) & MASK for k, weyl in zip(key, (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B), strict=True)]
        x = ((second >> 64) ^ x[1] ^ keys[0], second & MASK, (first >> 64) ^ x[3] ^ keys[1], first & MASK)
    return x


def words(seed: int, name: str, start: int, stop: int) -> list[int]:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    key = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))
    return [philox(i // 4 + 1, key)[i % 4] for i in range(start, stop)]


@pytest.mark.parametrize(("start", "stop"), [(0, 300), (5, 6), (2**40 + 3, 2**40 + 20)])
def test_every_element_is_a_function_of_its_place(start: int, stop: int) -> None:
    places = [((word >> 12) + 0.5) / 2**52 for word in words(7, "a.weight", start, stop)]
    inverse = statistics.NormalDist(0, 0.3).inv_cdf
    expected = torch.tensor([inverse(place) for place in places], dtype=torch.float64)
    torch.testing.assert_close(normal(7, "a.weight", start, stop, 0.3).double(), expected, rtol=1e-7, atol=0)
    expected = torch.tensor([2 * place - 1 for place in places], dtype=torch.float64)
    torch.testing.assert_close(uniform(7, "a.weight", start, stop, 2.0).double(), 2 * expected, rtol=1e-7, atol=0)


def test_the_tails_are_those_of_the_normal_distribution() -> None:
    from speedrun.model.random_stream import _normal

    probabilities = np.array([2.0**-53, 2.0**-40, 0.0242, 0.02425, 0.0243, 0.4, 0.97574, 0.97576, 1 - 2.0**-40])
    expected = [statistics.NormalDist().inv_cdf(probability) for probability in probabilities.tolist()]
    np.testing.assert_allclose(_normal(probabilities - 0.5), expected, rtol=2e-9)


def test_any_part_is_the_whole_ones_to_the_bit() -> None:
    """Also where the whole one is made in several pieces, and in any dtype that it is rounded to."""
    whole = normal(1, "w", 0, 70_000, 1.0)
    for start, stop in ((0, 1), (1, 4), (32_767, 32_769), (65_535, 70_000), (9, 9)):
        assert torch.equal(normal(1, "w", start, stop, 1.0), whole[start:stop])
    assert not torch.equal(whole, normal(1, "v", 0, 70_000, 1.0)) and whole.unique().numel() > 69_000


@pytest.mark.parametrize("name", ("tiny", "gpt2", "modern", "speedrun"))
def test_parts_of_every_parameter(name: str) -> None:
    """A part at the beginning, in the middle and at the end, as two ranks get it whose cut lies there."""
    with torch.device("meta"):
        values = GPT(PRESETS[name][1].model).initial(3)
    for parameter, shape in parameter_shapes(PRESETS[name][1].model).items():
        numel = torch.Size(shape).numel()
        cut = numel // 3
        first, last = max(cut - 40, 0), min(cut + 41, numel)
        assert torch.equal(
            torch.cat((values(parameter, first, cut), values(parameter, cut, last))), values(parameter, first, last)
        )
        assert values(parameter, numel - 1, numel).shape == (1,)


def test_a_parameter_draws_the_same_numbers_whatever_others_there_are() -> None:
    plain, more = ModelConfig(layers=2, width=64, heads=2), ModelConfig(layers=3, width=64, heads=2, smear=True)
    models = [GPT(plain), GPT(more)]
    for model in models:
        model.init_weights(4)
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name)), name
