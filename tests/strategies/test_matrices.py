"""Who owns which matrix, and the exchange: every matrix comes together once, and no byte more is sent than it takes."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from speedrun.config import ModelConfig, OptimizerConfig
from speedrun.model import GPT
from speedrun.optim.policy import parameter_groups
from strategies import matrices, owners
from strategies.layout import EMPTY, Interval, Intervals, Shape, row_blocks
from strategies.matrices import reduce_to_owners, stacks, transform_replicated, transform_sharded
from strategies.owners import Matrix, assign_owners, banks, rounds
from tests.ranks import RankPool
from tests.strategies.small import STRATEGIES, forward_backward, make, place

SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12).map(
    lambda shapes: {f"m{i}": shape for i, shape in enumerate(shapes)}
)
WORLDS = st.integers(1, 9)


def work(shape: Shape) -> int:
    """Multiplications of X·Xᵀ with X on its long side."""
    return shape[0] * shape[1] * min(shape)


@given(SHAPES, WORLDS)
def test_owners_are_ranks_and_their_work_is_even(shapes: dict[str, Shape], world_size: int) -> None:
    owner_of = assign_owners(shapes, world_size)
    assert set(owner_of) == set(shapes) and set(owner_of.values()) <= set(range(world_size))
    load = Counter({rank: 0 for rank in range(world_size)})
    for name, owner in owner_of.items():
        load[owner] += work(shapes[name])
    # Greedy: whoever got the last matrix was the least loaded before it.
    largest = max(map(work, shapes.values()), default=0)
    assert max(load.values()) - min(load.values()) <= largest


def test_the_owner_holds_most_of_the_matrix() -> None:
    held = {
        "a": (Interval(0, 2), Interval(2, 12)),
        "b": (Interval(0, 12), EMPTY),
        "c": (Interval(0, 6), Interval(6, 12)),
    }
    owner_of = assign_owners({name: (3, 4) for name in held}, 2, held)
    assert owner_of["a"] == 1 and owner_of["b"] == 0


@given(SHAPES, WORLDS, st.integers(1, 400))
def test_rounds_hold_every_matrix_once_and_no_more_than_fits(
    shapes: dict[str, Shape], world_size: int, limit: int
) -> None:
    owner_of = assign_owners(shapes, world_size)
    whole = [Matrix(name, shape, row_blocks(shape, world_size), owner_of[name]) for name, shape in shapes.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owners, "ROUND_ELEMENTS", limit)
        turns = rounds(whole, world_size)
    assert sorted(m.name for turn in turns for theirs in turn for m in theirs) == sorted(shapes)
    assert all(len(turn) == world_size for turn in turns)
    assert all(m.owner == rank for turn in turns for rank, theirs in enumerate(turn) for m in theirs)
    for rank in range(world_size):
        sizes = [[m.numel for m in turn[rank]] for turn in turns if turn[rank]]
        assert all(len(numels) == 1 or sum(numels) <= limit // world_size for numels in sizes)
        # No round is opened while the one before has room.
        assert all(sum(a) + b[0] > limit // world_size for a, b in zip(sizes, sizes[1:], strict=False))


@given(SHAPES, WORLDS, st.integers(1, 400))
def test_banks_hold_every_matrix_once_at_its_owner_and_few_empty_places(
    shapes: dict[str, Shape], world_size: int, limit: int
) -> None:
    owner_of = assign_owners(shapes, world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owners, "BANK_ELEMENTS", limit)
        made = banks([Matrix(name, shape, (), owner_of[name]) for name, shape in shapes.items()], world_size)
    there = [(m, rank) for bank in made for rank, theirs in enumerate(bank.of_rank) for m in theirs]
    assert sorted(m.name for m, _ in there) == sorted(shapes)
    assert all(m.owner == rank for m, rank in there)
    assert all(m.numel == bank.numel for bank in made for theirs in bank.of_rank for m in theirs)
    assert all(bank.sent <= limit or bank.places == 1 for bank in made)
    for numel in {bank.numel for bank in made}:
        places = sum(bank.places for bank in made if bank.numel == numel)
        assert places == -(-sum(m.numel == numel for m, _ in there) // world_size), "an equal share, rounded up"


@given(SHAPES)
def test_stacks_hold_every_matrix_once_and_one_shape_each(shapes: dict[str, Shape]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "STACK_ELEMENTS", 60)
        stacked = list(stacks(Matrix(name, shape, (), 0) for name, shape in shapes.items()))
    assert sorted(m.name for stack in stacked for m in stack) == sorted(shapes)
    for stack in stacked:
        assert len({m.shape for m in stack}) == 1
        assert len(stack) == 1 or sum(m.numel for m in stack) <= 60


# The exchange, in ranks. The stand-in for orthogonalisation depends on every element of the matrix.


def cube(stack: Tensor) -> Tensor:
    return stack @ stack.mT @ stack


def weights_of(shapes: dict[str, Shape], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def random_problem(seed: int, world_size: int) -> tuple[dict[str, Shape], dict[str, Intervals]]:
    """Matrices cut anywhere: in mid-row, into empty parts, or not at all. Sometimes fewer matrices than ranks."""
    random_ = random.Random(seed)
    shapes, held = {}, {}
    for i in range(random_.randint(0, 2 * world_size)):
        shape = (random_.randint(1, 7), random_.randint(1, 7))
        numel = shape[0] * shape[1]
        cuts = sorted(random_.choice((0, numel, random_.randint(0, numel))) for _ in range(world_size - 1))
        bounds = [0, *cuts, numel]
        parts = [Interval(first, last) for first, last in zip(bounds[:-1], bounds[1:], strict=True)]
        shapes[f"m{i}"], held[f"m{i}"] = shape, tuple(part if part.numel else EMPTY for part in parts)
    return shapes, held


def exchange_sharded(seed: int) -> int:
    """Returns how many matrices this rank transformed. Rounds of one matrix, of a few and of all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owners, "ROUND_ELEMENTS", (1, 60, 10_000)[seed % 3])
        return _exchange_sharded(seed)


def _exchange_sharded(seed: int) -> int:
    here = place()
    shapes, held = random_problem(seed, here.world_size)
    whole = weights_of(shapes, seed)
    owner_of = assign_owners(shapes, here.world_size, held)
    if seed % 2:  # any owner will do, also one that holds nothing
        owner_of = {name: (seed + i) % here.world_size for i, name in enumerate(shapes)}
    problem = [Matrix(name, shape, held[name], owner_of[name]) for name, shape in shapes.items()]
    local = {name: whole[name].flatten()[slice(*held[name][here.rank])].clone() for name in shapes}
    before = {name: part.clone() for name, part in local.items()}
    transformed = 0

    def transform(stack: Tensor, which: list[Matrix]) -> Tensor:
        nonlocal transformed
        assert len(stack) == len(which)
        transformed += len(stack)
        return cube(stack)

    updates: dict[str, Tensor] = {}

    def apply(names: list[str], parts: list[Tensor]) -> None:
        for name, update in zip(names, parts, strict=True):
            assert name not in updates and update.ndim == 1
            updates[name] = update.clone()

    transform_sharded(problem, local, transform, apply, here)
    assert set(updates) == {name for name in shapes if held[name][here.rank].numel}
    for name, update in updates.items():
        expected = cube(whole[name].double()).flatten()[slice(*held[name][here.rank])]
        torch.testing.assert_close(update, expected.float(), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(local[name], before[name]) for name in shapes), "the momentum's slices are read, not written"
    return transformed


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_sharded_matrices_come_together_and_go_back(ranks: RankPool, world_size: int) -> None:
    for seed in range(12):
        transformed = ranks.run(world_size, exchange_sharded, seed)
        assert sum(transformed) == len(random_problem(seed, world_size)[0]), "each matrix exactly once over all ranks"


def exchange_replicated(seed: int) -> int:
    """As `exchange_sharded`, with banks of a place per rank, of a few and of all matrices of a size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owners, "BANK_ELEMENTS", (1, 60, 10_000)[seed % 3])
        return _exchange_replicated(seed)


def _exchange_replicated(seed: int) -> int:
    here = place()
    shapes, _ = random_problem(seed, here.world_size)
    owner_of = assign_owners(shapes, here.world_size)
    problem = [Matrix(name, shape, (), owner_of[name]) for name, shape in shapes.items()]
    of_rank = [weights_of(shapes, 1000 * seed + rank) for rank in range(here.world_size)]
    mean = {name: torch.stack([whole[name].double() for whole in of_rank]).mean(0) for name in shapes}
    reduced = reduce_to_owners(problem, of_rank[here.rank], here)
    assert set(reduced) == {name for name in shapes if owner_of[name] == here.rank}
    for name, tensor in reduced.items():
        torch.testing.assert_close(tensor, mean[name].flatten().float(), rtol=1e-5, atol=1e-6)
    transformed = 0

    def transform(stack: Tensor, which: list[Matrix]) -> Tensor:
        nonlocal transformed
        assert len(stack) == len(which)
        transformed += len(stack)
        return cube(stack)

    updates: dict[str, Tensor] = {}
    local = {name: reduced.get(name, torch.empty(0)) for name in shapes}

    def apply(names: list[str], parts: list[Tensor]) -> None:
        updates.update({name: part.clone() for name, part in zip(names, parts, strict=True)})

    transform_replicated(problem, local, transform, apply, here)
    assert set(updates) == set(shapes)
    for name, update in updates.items():
        torch.testing.assert_close(update, cube(mean[name]).flatten().float(), rtol=1e-3, atol=1e-4)
    return transformed


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_replicated_matrices_are_averaged_on_their_owner_and_shared(ranks: RankPool, world_size: int) -> None:
    for seed in range(12):
        transformed = ranks.run(world_size, exchange_replicated, seed)
        assert sum(transformed) == len(random_problem(seed, world_size)[0])


# What the exchange sends. The collectives are counted where strategies/matrices.py calls them.


class CountingDist:
    """torch.distributed, noting for each call how many elements leave this rank and how many come in."""

    def __init__(self) -> None:
        self.sent = self.received = 0

    def all_to_all_single(self, output: Tensor, input: Tensor, receive: list[int], send: list[int], group: Any) -> Any:
        rank = dist.get_rank()
        assert send[rank] == receive[rank] == 0, "what stays here need not be exchanged"
        self.sent, self.received = self.sent + sum(send), self.received + sum(receive)
        return dist.all_to_all_single(output, input, receive, send, group=group)

    def reduce_scatter_tensor(self, output: Tensor, input: Tensor, group: Any) -> Any:
        others = input.numel() - output.numel()
        self.sent += others  # on a ring: every piece passes through, but for the own one
        self.received += others
        return dist.reduce_scatter_tensor(output, input, group=group)

    def all_gather_into_tensor(self, output: Tensor, input: Tensor, group: Any, async_op: bool) -> Any:
        self.sent += (dist.get_world_size() - 1) * input.numel()
        self.received += output.numel() - input.numel()
        return dist.all_gather_into_tensor(output, input, group=group, async_op=async_op)


MODEL = ModelConfig(layers=4, heads=3, width=48, mlp_width=101)


@dataclass(frozen=True)
class Payload:
    """Elements that a rank sends and receives in one step's exchange; those of all block matrices; their owners."""

    sent: int
    received: int
    elements: int
    owners: dict[str, int]


def payload(name: str) -> Payload:
    model = GPT(MODEL, document_start=256)
    model.init_weights(1)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    recipe = parameter_groups(shapes, OptimizerConfig())
    strategy = make(name)
    strategy.prepare(model, recipe, clip=1.0, accumulation=1)
    counting = CountingDist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "dist", counting)
        forward_backward(strategy, 0)
        strategy.step()
    muon = [key for group in recipe if group.rule.whole_matrix for key in group.parameters]
    elements = sum(shapes[key][0] * shapes[key][1] for key in muon)
    return Payload(counting.sent, counting.received, elements, {key: strategy.optimizer.owners[key] for key in muon})


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_ddp_sends_what_an_all_reduce_of_the_matrices_would(ranks: RankPool, world_size: int) -> None:
    counted = ranks.run(world_size, payload, "ddp")
    # 16 matrices of 48 × 48 and 8 of 48 × 101: of three ranks each has 6 and 3 places for them.
    elements = counted[0].elements if world_size != 3 else 18 * 48 * 48 + 9 * 48 * 101
    ring = 2 * (world_size - 1) * elements  # all ranks together: each sends 2·(W − 1)/W of the tensor
    assert sum(rank.sent for rank in counted) == sum(rank.received for rank in counted) == ring


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", (2, 3, 4))
@pytest.mark.parametrize("name", STRATEGIES[1:])
def test_sharded_ranks_send_at_most_2_m_over_w(ranks: RankPool, name: str, world_size: int) -> None:
    counted = ranks.run(world_size, payload, name)
    elements = counted[0].elements
    assert elements == 4 * (4 * 48 * 48 + 2 * 48 * 101)
    for rank in counted:
        assert max(rank.sent, rank.received) <= 2 * elements / world_size, counted
        assert rank.owners == counted[0].owners
    if name == "zero1" and world_size == 2:
        assert all(rank.sent == 0 for rank in counted), "the boundary falls between two blocks"
