"""Muon's three parts against a plain restatement and torch's own Muon; AdamW is torch's function already."""

import pytest
import torch
from torch import Tensor

from speedrun.optim.orthogonalize import newton_schulz, polar_express
from speedrun.optim.rules import AdamW, Muon, NorMuon

OPTIONS = {
    "lr": 0.02,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "orthogonalization": "polar_express",
    "orthogonalization_steps": 5,
    "orthogonalization_dtype": "float32",
}


def gradients(shape: tuple[int, int], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def run(shape: tuple[int, int], options: dict, count: int = 6) -> Tensor:  # type: ignore[type-arg]
    """The rule on a whole matrix, as the optimizer calls it on one rank."""
    rule = Muon()
    weight, state = torch.ones(shape).view(-1), {"momentum_buffer": torch.zeros(shape).view(-1)}
    for gradient in gradients(shape, count):
        held = gradient.clone().view(-1)
        rule.accumulate([held], [state], options)
        rule.apply(weight, rule.transform(held.view(1, *shape), options).reshape(-1), options)
    return weight.view(shape)


@pytest.mark.parametrize("shape", ((12, 12), (31, 8), (8, 31)))
def test_muon_is_its_restatement(shape: tuple[int, int]) -> None:
    weight, momentum = torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients(shape, 6):
        momentum = 0.9 * momentum + 0.1 * gradient.double()
        ahead = 0.9 * momentum + 0.1 * gradient.double()
        update = polar_express(ahead[None], dtype=torch.float64)[0] * max(1.0, shape[0] / shape[1]) ** 0.5
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * update
    torch.testing.assert_close(run(shape, OPTIONS).double(), weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", ((12, 12), (31, 8), (8, 31)))
def test_muon_is_torchs_within_bfloat16(shape: tuple[int, int]) -> None:
    options = {**OPTIONS, "orthogonalization": "newton_schulz", "orthogonalization_dtype": "bfloat16"}
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = torch.optim.Muon([weight], lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True)
    for gradient in gradients(shape, 6):
        weight.grad = gradient.clone()
        optimizer.step()
    moved = (weight.detach() - 1).norm()
    assert (run(shape, options) - weight.detach()).norm() / moved < 0.02


def test_the_elementwise_parts_do_not_mind_where_a_matrix_is_cut() -> None:
    rule, shape = Muon(), (7, 5)
    whole, cut = gradients(shape, 1)[0].view(-1), gradients(shape, 1)[0].view(-1)
    states = [{"momentum_buffer": torch.full((35,), 0.5)} for _ in range(2)]
    rule.accumulate([whole], [states[0]], OPTIONS)
    first, second = cut[:13], cut[13:]
    halves = [
        {"momentum_buffer": part} for part in (states[1]["momentum_buffer"][:13], states[1]["momentum_buffer"][13:])
    ]
    rule.accumulate([first, second], halves, OPTIONS)
    # Not to the bit: a processor's vector instructions begin at another element of a slice.
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(states[1]["momentum_buffer"], states[0]["momentum_buffer"], rtol=1e-6, atol=1e-7)


def test_transform_takes_the_method_the_steps_and_the_dtype_from_the_options() -> None:
    matrix = gradients((9, 9), 1)[0][None]
    for name, function in (("newton_schulz", newton_schulz), ("polar_express", polar_express)):
        for steps, dtype in ((3, "float32"), (5, "bfloat16")):
            options = {
                **OPTIONS,
                "orthogonalization": name,
                "orthogonalization_steps": steps,
                "orthogonalization_dtype": dtype,
            }
            assert torch.equal(Muon().transform(matrix, options), function(matrix, steps, getattr(torch, dtype)))


def test_adamw_does_not_mind_where_a_parameter_is_cut() -> None:
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

    def step(pieces: list[slice]) -> Tensor:
        weight = torch.ones(40)
        states = [
            {"exp_avg": torch.zeros(40)[cut], "exp_avg_sq": torch.zeros(40)[cut], "step": torch.zeros(())}
            for cut in pieces
        ]
        for gradient in gradients((8, 5), 4):
            AdamW().step([weight[cut] for cut in pieces], [gradient.view(-1)[cut] for cut in pieces], states, options)
        return weight

    torch.testing.assert_close(step([slice(0, 40)]), step([slice(0, 11), slice(11, 40)]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("lr", (1e39, 1e300))
def test_a_rate_beyond_float32_overflows_the_weights_and_raises_nothing(lr: float) -> None:
    weight = torch.ones(2, 2)
    Muon().apply(weight, torch.full((2, 2), 10.0), {**OPTIONS, "lr": lr, "weight_decay": 0.0})
    assert not torch.isfinite(weight).any()


# NorMuon, cautious decay, and AdamW that does not update at every step.


@pytest.mark.parametrize("cautious", (False, True))
@pytest.mark.parametrize("shape", ((12, 12), (31, 8), (8, 31)))
def test_normuon_is_its_description_in_float64(shape: tuple[int, int], cautious: bool) -> None:
    """Element by element: rows of a tall or square matrix, columns of a wide one."""
    options = {**OPTIONS, "beta2": 0.8, "cautious": cautious}
    weight, state = torch.ones(shape).view(-1), {"momentum_buffer": torch.zeros(shape).view(-1)}
    moments = {"second_moment": torch.zeros(max(shape))}
    expected, momentum = torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    squares = [0.0] * max(shape)
    rule, tall = NorMuon(), shape[0] >= shape[1]
    for gradient in gradients(shape, 6):
        held = gradient.clone().view(-1)
        rule.accumulate([held], [state], options)
        update = rule.transform(held.view(1, *shape), options, [moments])
        rule.apply(weight, update.reshape(-1), options)

        momentum = 0.9 * momentum + 0.1 * gradient.double()
        orthogonal = polar_express((0.9 * momentum + 0.1 * gradient.double())[None], dtype=torch.float64)[0]
        scaled = orthogonal.clone()
        for i in range(max(shape)):
            line = orthogonal[i] if tall else orthogonal[:, i]
            squares[i] = 0.8 * squares[i] + 0.2 * (line**2).mean().item()
            (scaled[i] if tall else scaled[:, i]).div_(squares[i] ** 0.5)
        scaled *= orthogonal.norm() / scaled.norm() * max(1.0, shape[0] / shape[1]) ** 0.5
        decays = (scaled * expected >= 0).double() if cautious else 1.0
        expected = expected - 0.02 * 0.1 * decays * expected - 0.02 * scaled
    torch.testing.assert_close(weight.view(shape).double(), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(moments["second_moment"], torch.tensor(squares), rtol=1e-5, atol=0)
    if cautious:
        assert (decays == 0).any() and (decays == 1).any()  # type: ignore[union-attr]


def test_normuon_leaves_a_zero_matrix_zero_and_stacks_are_single_matrices() -> None:
    options = {**OPTIONS, "beta2": 0.9}
    matrices = torch.stack([torch.zeros(6, 4), *gradients((6, 4), 2)])
    states = [{"second_moment": torch.zeros(6)} for _ in range(3)]
    together = NorMuon().transform(matrices, options, states)
    assert not together[0].any() and not states[0]["second_moment"].any()
    for i in range(3):
        alone = {"second_moment": torch.zeros(6)}
        torch.testing.assert_close(NorMuon().transform(matrices[i][None], options, [alone])[0], together[i])
        torch.testing.assert_close(alone["second_moment"], states[i]["second_moment"])


def adamw_float64(gradients: list[Tensor], weight: Tensor, decay: float, cautious: bool) -> Tensor:
    m = v = torch.zeros_like(weight)
    for step, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        update = m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        decays = (update * weight >= 0) if cautious else torch.ones_like(weight)
        weight = weight - 0.01 * decay * weight * decays - 0.01 * update
    return weight


@pytest.mark.parametrize("every", (1, 2, 3))
@pytest.mark.parametrize("cautious", (False, True))
def test_adamw_every_few_steps_takes_the_sum_of_the_gradients_since(every: int, cautious: bool) -> None:
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.3, "cautious": cautious}
    rule = AdamW(accumulates=every > 1)
    start = gradients((8, 5), 1)[0].view(-1)
    weight = start.clone()
    state = {buffer: torch.zeros(40) for buffer in rule.buffers} | {"step": torch.zeros(())}
    seen = gradients((8, 5), 7)[1:]
    for step, gradient in enumerate(seen):
        before = weight.clone()
        rule.step([weight], [gradient.clone().view(-1)], [state], options | {"update": (step + 1) % every == 0})
        assert torch.equal(weight, before) == ((step + 1) % every != 0)
    sums = [sum(seen[i : i + every]).double().view(-1) for i in range(0, 6, every)]  # type: ignore[union-attr]
    expected = adamw_float64(sums, start.double(), 0.3, cautious)
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)
