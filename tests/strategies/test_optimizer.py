"""The optimizer over intervals: alone against torch and a float64 restatement, on ranks against one process."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardrun.certify.equivalence import Case, Trace, compare, run_reference, run_strategy
from speedrun.optim.rules import AdamW, Muon, NorMuon
from strategies.base import Settings, Strategy
from strategies.mesh import Place
from strategies.optimizer import IntervalOptimizer
from strategies.single.engine import Single
from tests.ranks import RankPool
from tests.strategies.small import STRATEGIES, batch, build, make, prepared, recipe_of

ALONE = Settings(Place(0, 1, torch.device("cpu")), "fp32", {})

ADAMW = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MUON = {
    "lr": 0.02,
    "momentum": 0.95,
    "weight_decay": 0.01,
    "orthogonalization": "newton_schulz",
    "orthogonalization_steps": 5,
    "orthogonalization_dtype": "float32",
}


@dataclass(frozen=True)
class Group:
    """A line of a recipe: the optimizer asks for no more than these four."""

    name: str
    rule: Any
    parameters: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 9))


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def bound(model: nn.Module, recipe: list[Group]) -> IntervalOptimizer:
    strategy = Single(ALONE)
    strategy.prepare(model, recipe, clip=0.0, accumulation=1)
    return strategy.optimizer


EVERYTHING = ("0.weight", "0.bias", "2.weight", "2.bias")
MATRICES, VECTORS = EVERYTHING[::2], EVERYTHING[1::2]


def test_adamw_is_torchs_bit_for_bit() -> None:
    ours, theirs = small_model(), small_model()
    optimizer = bound(ours, [Group("all", AdamW(), EVERYTHING, ADAMW)])
    reference = torch.optim.AdamW(theirs.parameters(), fused=True, **ADAMW)
    for step in range(10):
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 0.01 / (step + 1)
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], reference.state[q]["exp_avg"].view(-1))
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], reference.state[q]["exp_avg_sq"].view(-1))


def muon_float64(weight: Tensor, gradients: list[Tensor], options: dict[str, Any]) -> Tensor:
    """Muon from its description: Nesterov momentum; the quintic applied to the singular values of an SVD."""
    momentum = torch.zeros_like(weight)
    mu, lr = options["momentum"], options["lr"]
    for gradient in gradients:
        momentum = mu * momentum + (1 - mu) * gradient
        u, s, vh = torch.linalg.svd((1 - mu) * gradient + mu * momentum, full_matrices=False)
        s = s / s.square().sum().sqrt()
        for _ in range(options["orthogonalization_steps"]):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
        weight = weight * (1 - lr * options["weight_decay"]) - lr * scale * (u * s @ vh)
    return weight


def test_muon_is_its_description_in_float64() -> None:
    model = small_model()
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    optimizer = bound(model, [Group("matrices", Muon(), MATRICES, MUON), Group("vectors", AdamW(), VECTORS, ADAMW)])
    gradients: dict[str, list[Tensor]] = {name: [] for name in MATRICES}
    for step in range(8):
        set_gradients(model, step)
        for name in MATRICES:
            gradients[name].append(dict(model.named_parameters())[name].grad.double())  # type: ignore[union-attr]
        optimizer.step()
    for name in MATRICES:
        expected = muon_float64(start[name], gradients[name], MUON)
        torch.testing.assert_close(dict(model.named_parameters())[name].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rule", (Muon(), NorMuon()))
def test_a_saved_and_loaded_state_continues_the_same(rule: Muon) -> None:
    options = {**MUON, "beta2": 0.9}
    recipe = [Group("matrices", rule, MATRICES, options), Group("vectors", AdamW(True), VECTORS, ADAMW)]
    model = small_model()
    optimizer = bound(model, recipe)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    other = small_model(seed=1)
    resumed = bound(other, recipe)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        for trained, its in ((model, optimizer), (other, resumed)):
            set_gradients(trained, step)
            its.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    # And it is the state that made it so.
    fresh = bound(small_model(), recipe)
    assert not fresh.state and len(resumed.state) == 4


def test_reset_forgets_everything() -> None:
    recipe = [Group("matrices", Muon(), MATRICES, MUON), Group("vectors", AdamW(), VECTORS, ADAMW)]
    first, second = small_model(), small_model()
    one, other = bound(first, recipe), bound(second, recipe)
    set_gradients(first, 7)
    one.step()
    assert any(tensor.any() for state in one.full_state().values() for tensor in state.values())
    first.load_state_dict(second.state_dict())
    one.reset()
    assert not any(tensor.any() for state in one.full_state().values() for tensor in state.values())
    for model, optimizer in ((first, one), (second, other)):
        set_gradients(model, 8)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("names", "culprit"),
    [
        (EVERYTHING[:3], "2.bias"),
        ((*EVERYTHING, "3.weight"), "3.weight"),
        ((*EVERYTHING, "0.weight"), "0.weight"),
    ],
)
def test_a_recipe_names_every_parameter_once(names: tuple[str, ...], culprit: str) -> None:
    with pytest.raises(ValueError, match=f"every parameter once; look at '{culprit}'"):
        IntervalOptimizer(small_model(), [Group("all", AdamW(), names, ADAMW)])


class Unused(nn.Module):
    """A matrix that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).square().mean()


def train_unused(name: str, rule: str) -> str:
    model = Unused()
    strategy = Single(ALONE) if name == "single" else make(name)
    if name == "fsdp":
        strategy.settings.engine["wrap"] = []
    rule_, options = (Muon(), MUON) if rule == "muon" else (AdamW(), ADAMW)
    matrices = Group("matrices", rule_, ("used.weight", "unused.weight"), options)
    strategy.prepare(model, [matrices, Group("vector", AdamW(), ("used.bias",), ADAMW)], 1.0, 1)
    with strategy.micro_batch(last=True):
        strategy.backward(strategy.model(torch.ones(2, 4)))
    with pytest.raises(RuntimeError) as error:
        strategy.step()
    return str(error.value)


@pytest.mark.parametrize("rule", ("adamw", "muon"))
def test_an_unused_parameter_is_named(rule: str) -> None:
    assert train_unused("single", rule) == "unused.weight has no gradient: it took no part in the forward pass."


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "rule"), (("ddp", "muon"), ("fsdp", "muon"), ("fsdp", "adamw")))
def test_an_unused_parameter_is_named_on_every_rank(ranks: RankPool, name: str, rule: str) -> None:
    for said in ranks.run(2, train_unused, name, rule):
        assert said == "unused.weight has no gradient: it took no part in the forward pass."


# State and weights, whole, out of every strategy.


def train(strategy: Strategy, case: Case, world_size: int, ranks: range) -> None:
    """Three steps of which each of `ranks` contributes its rows of every global batch."""
    for step in range(3):
        for group in strategy.optimizer.param_groups:
            group["update"] = step % 2 == 1  # where AdamW accumulates, a sum is left after the last step
        for i in range(case.accumulation):
            parts = [batch(10 * step + i, rank) for rank in ranks]
            inputs, targets = (torch.cat([part[side] for part in parts]) for side in (0, 1))
            with strategy.micro_batch(last=i == case.accumulation - 1):
                strategy.backward(strategy.model(inputs, targets))
        strategy.step()


Whole = tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]


def whole_of(name: str, case: Case, steps: bool = True) -> Whole:
    strategy = prepared(make(name), case)
    if steps:
        train(strategy, case, dist.get_world_size(), range(dist.get_rank(), dist.get_rank() + 1))
    return strategy.optimizer.full_state(), strategy.optimizer.full_weights()


def alone(case: Case, world_size: int) -> Whole:
    """One process with all ranks' rows."""
    strategy = prepared(Single(ALONE), case)
    train(strategy, case, world_size, range(world_size))
    return strategy.optimizer.full_state(), strategy.optimizer.full_weights()


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", (2, 3))
@pytest.mark.parametrize("name", STRATEGIES)
def test_full_state_and_weights_are_the_single_process_ones(ranks: RankPool, name: str, world_size: int) -> None:
    for case in (Case(accumulation=2, tied=True), Case(record=True)):
        check_whole(ranks, world_size, name, case)


def check_whole(ranks: RankPool, world_size: int, name: str, case: Case) -> None:
    expected_state, expected_weights = alone(case, world_size)
    for state, weights in ranks.run(world_size, whole_of, name, case):  # the same on every rank
        assert set(state) == set(weights) == set(expected_weights)
        for key, buffers in expected_state.items():
            assert set(state[key]) == set(buffers)
            torch.testing.assert_close(weights[key], expected_weights[key], rtol=0, atol=3e-5)
            for buffer, tensor in buffers.items():
                assert state[key][buffer].dtype == torch.float32
                scale = tensor.abs().max()
                assert scale > 0, (key, buffer)
                error = (state[key][buffer] - tensor).abs().max() / scale
                # A key bias has a gradient of rounding errors alone: it moves all scores of a query alike.
                assert error < 1e-3 or key.endswith("k.bias"), (key, buffer, error)


@pytest.mark.ranks
@pytest.mark.parametrize("name", STRATEGIES)
def test_before_the_first_step_state_is_zero_and_weights_are_the_models(ranks: RankPool, name: str) -> None:
    case = Case()
    expected = dict(build(case).named_parameters())
    rules = {key: group.rule for group in recipe_of(case) for key in group.parameters}
    buffers = {key: (*rule.buffers, *rule.matrix_buffers) for key, rule in rules.items()}
    for state, weights in ranks.run(2, whole_of, name, case, False):
        assert {key: tuple(its) for key, its in state.items()} == buffers
        for key, p in expected.items():
            assert torch.equal(weights[key], p.detach())
            assert all(t.shape == p.shape and not t.any() for t in state[key].values())


# DeepSpeed's options that change the order of things.


def run_zero(name: str, case: Case, zero: dict[str, Any]) -> tuple[Trace, int]:
    """The trace, and how many flat buffers DeepSpeed steps one after another."""
    strategy: Any = make(name, **zero)
    trace = run_strategy(case, strategy, dist.get_rank(), dist.get_world_size())
    return trace, len(strategy.optimizer.slices)


@pytest.mark.ranks
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_zero3_in_several_sub_groups_equals_the_reference(ranks: RankPool, optimizer: str) -> None:
    case = Case(optimizer=optimizer, accumulation=3, steps=6)
    trace, flat_buffers = ranks.run(3, run_zero, "zero3", case, {"sub_group_size": 1000})[0]
    assert flat_buffers > 2 * len(recipe_of(case))
    assert compare(trace, run_reference(case)).equal


@pytest.mark.ranks
@pytest.mark.parametrize("name", ("zero1", "zero2", "zero3"))
def test_small_buckets_and_overlap_equal_the_reference(ranks: RankPool, name: str) -> None:
    case = Case(accumulation=3, steps=6)
    options = {"reduce_bucket_size": 3000, "overlap_comm": True}
    trace, _ = ranks.run(2, run_zero, name, case, options)[0]
    assert compare(trace, run_reference(case)).equal


@pytest.mark.ranks
def test_zero3_with_persistent_parameters_equals_the_reference(ranks: RankPool) -> None:
    case = Case(accumulation=3, steps=6)
    trace, _ = ranks.run(2, run_zero, "zero3", case, {"stage3_param_persistence_threshold": 5000})[0]
    assert compare(trace, run_reference(case)).equal
