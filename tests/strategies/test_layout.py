"""The layout: as arithmetic, against brute force; and against where every library really puts its tensors."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardrun.certify.equivalence import Case, compare, run_reference, run_strategy
from strategies.base import Precision, Strategy
from strategies.layout import (
    Intervals,
    Shape,
    equal_cuts,
    everywhere,
    flat_partition,
    flat_partition_size,
    on_rank,
    row_blocks,
)
from strategies.optimizer import local
from tests.ranks import RankPool
from tests.strategies.small import STRATEGIES, build, make, prepared

SHAPES = st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)
WORLDS = st.integers(1, 9)


def assert_a_partition(intervals: Intervals, numel: int) -> None:
    """Disjoint, in the order of the ranks, and together everything."""
    held = [interval for interval in intervals if interval.numel]
    assert all(interval.numel >= 0 for interval in intervals)
    assert [element for interval in held for element in range(*interval)] == list(range(numel))


@given(SHAPES, WORLDS)
def test_row_blocks_and_equal_cuts_partition_a_parameter(shape: Shape, world_size: int) -> None:
    for cut in (row_blocks, equal_cuts):
        intervals = cut(shape, world_size)
        assert len(intervals) == world_size
        assert_a_partition(intervals, math.prod(shape))


@given(SHAPES, WORLDS)
def test_row_blocks_are_those_of_torch_chunk(shape: Shape, world_size: int) -> None:
    tensor = torch.arange(math.prod(shape)).view(shape)
    chunks = [chunk.flatten() for chunk in tensor.chunk(world_size)]
    chunks += [torch.empty(0)] * (world_size - len(chunks))
    for interval, chunk in zip(row_blocks(shape, world_size), chunks, strict=True):
        assert tensor.flatten()[interval.start : interval.stop].tolist() == chunk.tolist()


@given(SHAPES, WORLDS)
def test_equal_cuts_are_equal_but_for_the_end(shape: Shape, world_size: int) -> None:
    padded = torch.full((math.ceil(math.prod(shape) / world_size) * world_size,), -1)
    padded[: math.prod(shape)] = torch.arange(math.prod(shape))
    for interval, part in zip(equal_cuts(shape, world_size), padded.view(world_size, -1), strict=True):
        assert list(range(*interval)) == [element for element in part.tolist() if element >= 0]


@given(st.lists(SHAPES, min_size=1, max_size=6), WORLDS)
def test_flat_partition_is_a_cut_of_a_flat_buffer(shapes: list[Shape], world_size: int) -> None:
    named = {f"p{i}": shape for i, shape in enumerate(shapes)}
    # The buffer element by element: (parameter, its element), then padding up to a multiple of 2 · world_size.
    flat = [(name, i) for name, shape in named.items() for i in range(math.prod(shape))]
    while len(flat) % (2 * world_size):
        flat.append(("padding", -1))
    part = len(flat) // world_size
    assert flat_partition_size([math.prod(shape) for shape in shapes], world_size) == part
    for name, intervals in flat_partition(named, world_size).items():
        assert_a_partition(intervals, math.prod(named[name]))
        for rank, interval in enumerate(intervals):
            mine = [i for owner, i in flat[rank * part : (rank + 1) * part] if owner == name]
            assert list(range(*interval)) == mine


@given(SHAPES, WORLDS, st.data())
def test_everywhere_and_on_rank(shape: Shape, world_size: int, data: st.DataObject) -> None:
    numel = math.prod(shape)
    owner = data.draw(st.integers(0, world_size - 1))
    assert everywhere(shape, world_size) == ((0, numel),) * world_size
    assert [interval.numel for interval in on_rank(shape, owner, world_size)] == [
        numel if rank == owner else 0 for rank in range(world_size)
    ]


# Against live tensors. Each function walks the library's own structures and yields, for every parameter, the elements
# that this rank really holds and in which interval of the parameter they lie.


def live_ddp(strategy: Any) -> dict[str, tuple[Tensor, int]]:
    return {name: (p.detach().view(-1), 0) for name, p in strategy.model.module.named_parameters()}


def live_fsdp(strategy: Any) -> dict[str, tuple[Tensor, int]]:
    """FSDP2's shards, and where DTensor's own arithmetic says that they begin."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    live = {}
    for name, p in strategy.model.named_parameters():
        shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        assert p.to_local().shape == shape
        live[name] = (local(p), offset[0] * math.prod(p.shape[1:]) if p.to_local().numel() else 0)
    return live


def live_flat(strategy: Any) -> dict[str, tuple[Tensor, int]]:
    """ZeRO-1/2: the parameters lie in one flat buffer per group, of which this rank's partition is a part."""
    zero, rank = strategy.zero, dist.get_rank()
    names = {id(p): name for name, p in strategy.engine.module.named_parameters()}
    bf16_optimizer = hasattr(zero, "bf16_groups")
    groups = zero.bf16_groups if bf16_optimizer else zero.round_robin_bit16_groups
    partitions = zero.bf16_partitioned_groups if bf16_optimizer else zero.parallel_partitioned_bit16_groups
    flats = zero.bf16_groups_flat if bf16_optimizer else zero.bit16_groups_flat
    live = {}
    for index, (group, flat) in enumerate(zip(groups, flats, strict=True)):
        mine = partitions[index][rank]
        assert len({part.numel() for part in partitions[index]}) == 1
        begin = (mine.data_ptr() - flat.data_ptr()) // flat.element_size()
        for position, p in enumerate(group):
            offset = (p.data_ptr() - flat.data_ptr()) // flat.element_size()
            if not bf16_optimizer:
                assert offset == zero.round_robin_bit16_offsets[index][position]
            first, last = max(offset, begin), min(offset + p.numel(), begin + mine.numel())
            live[names[id(p)]] = (flat[first : max(first, last)], max(0, first - offset) if first < last else 0)
    return live


def live_partitions(strategy: Any) -> dict[str, tuple[Tensor, int]]:
    """ZeRO-3: every parameter's partition is `ds_tensor`, padded at the end."""
    live = {}
    for name, p in strategy.engine.module.named_parameters():
        first = min(dist.get_rank() * p.partition_numel(), p.ds_numel)
        last = min(first + p.partition_numel(), p.ds_numel)
        assert p.ds_tensor.numel() == p.partition_numel()
        live[name] = (p.ds_tensor.detach()[: last - first], first if first < last else 0)
    return live


LIVE = {"ddp": live_ddp, "fsdp": live_fsdp, "zero1": live_flat, "zero2": live_flat, "zero3": live_partitions}


def start(name: str, precision: Precision, case: Case, accumulate: str | None = None) -> Strategy:
    engine = {"data_types": {"grad_accum_dtype": accumulate}} if accumulate else None
    return prepared(make(name, precision, engine), case)


def check_live(name: str, precision: Precision, case: Case, accumulate: str | None = None) -> int:
    """On a rank: compare with the weights of the unsharded model. Returns the elements that were compared."""
    strategy: Any = start(name, precision, case, accumulate)
    optimizer, rank = strategy.optimizer, dist.get_rank()
    weights = {key: p.detach().view(-1) for key, p in build(case).named_parameters()}
    live = LIVE[name](strategy)
    pieces = {piece.name: piece for piece in optimizer.all_slices()}
    assert set(live) == set(pieces) == set(weights)
    for key, weight in weights.items():
        piece, (elements, begin) = pieces[key], live[key]
        interval = everywhere(piece.shape, dist.get_world_size())[rank] if piece.replicated else piece.state[rank]
        assert (interval.start, interval.numel) == (begin, elements.numel()), f"{key} {interval} {begin}"
        expected = weight[interval.start : interval.stop]
        assert torch.equal(elements, expected.to(elements.dtype)), key
        # What the optimizer updates: the same elements in float32, of bf16 weights too the values before rounding.
        master = optimizer.weight(piece)
        assert master.dtype == torch.float32 and torch.equal(master, expected), key
    return sum(elements.numel() for elements, _ in live.values())


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_layout_is_where_the_library_puts_things(ranks: RankPool, name: str, precision: Precision) -> None:
    for case in (Case(), Case(optimizer="adamw", tied=True)):
        whole = sum(p.numel() for p in build(case).parameters())
        for world_size in (2, 3, 4):
            compared = ranks.run(world_size, check_live, name, precision, case)
            assert sum(compared) == whole * (world_size if name == "ddp" else 1)


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", (2, 3, 4))
def test_the_layout_of_zero1_with_float32_accumulation(ranks: RankPool, world_size: int) -> None:
    """DeepSpeed has another class for it, BF16_Optimizer."""
    whole = sum(p.numel() for p in build(Case()).parameters())
    assert sum(ranks.run(world_size, check_live, "zero1", "bf16", Case(), "fp32")) == whole


def train_bf16(case: Case, engine: dict[str, Any]) -> tuple[Any, str]:
    strategy: Any = make("zero1", "bf16", engine)
    trace = run_strategy(case, strategy, dist.get_rank(), dist.get_world_size(), phases=True)
    return trace, type(strategy.zero).__name__


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("engine", "kind", "rounded"),
    [
        ({}, "DeepSpeedZeroOptimizer", True),
        # Accumulated in float32, but still sent in bf16, which is DeepSpeed's default for a bf16 model.
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "BF16_Optimizer", True),
        ({"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}, "BF16_Optimizer", False),
    ],
)
def test_zero1_in_bf16_trains_within_its_noise_however_it_accumulates(
    ranks: RankPool, engine: dict[str, Any], kind: str, rounded: bool
) -> None:
    case = Case(optimizer="muon", accumulation=3, steps=8)
    reference = run_reference(case, phases=True)
    trace, its_kind = ranks.run(3, train_bf16, case, engine)[0]
    assert its_kind == kind
    verdict = compare(trace, reference)
    # bf16 has 8 bits: 0.4 % per rounding.
    assert 1e-6 < verdict.loss < 2e-3 and verdict.norm < 2e-2, verdict
    gradient, expected = trace.phases[0]["reduce"], reference.phases[0]["reduce"]
    assert set(gradient) == set(expected)
    assert all(map(is_bf16, gradient.values())) == rounded
    off = sum((gradient[name] - tensor).square().sum() for name, tensor in expected.items())
    assert off < 0.01**2 * sum(tensor.square().sum() for tensor in expected.values())


def is_bf16(tensor: Tensor) -> bool:
    return torch.equal(tensor, tensor.bfloat16().float())
