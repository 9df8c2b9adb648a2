"""Simulated bytes against real ranks' allocator, against formulas and against another tracker's figures."""

import dataclasses
import functools
import gc
import resource
import sys
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shardrun.certify.equivalence import Case
from speedrun.config import Config
from speedrun.model import GPT, parameter_shapes
from speedrun.optim.policy import parameter_groups
from speedrun.presets import PRESETS
from strategies import catalogue
from strategies.base import Settings
from strategies.forecast.predict import predict_memory
from strategies.forecast.simulate import simulate, train
from strategies.forecast.traffic import predict_traffic
from strategies.ledger.replay import PASSES, Replay
from strategies.ledger.terms import Group, Scenario
from strategies.ledger.tracer import Event, Tracer
from strategies.loss_scale import DynamicLossScale
from strategies.mesh import Place
from tests.ranks import RankPool
from tests.strategies.ledger.allocator import build, compiler, install
from tests.strategies.small import allow_fp16

STRATEGIES = catalogue.spread()
COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "all_to_all_single", "broadcast"),
)
MiB = 2**20


def engine(name: str, **zero: Any) -> dict[str, Any]:
    if name == "fsdp":
        return {"reshard_after_forward": True, "wrap": ["Block"]}
    return {"zero_optimization": {"stage": int(name[-1]), **zero}} if name.startswith("zero") else {}


def simulated(name: str, rank: int, world_size: int, config: Config, batch: tuple[int, int], **options: Any) -> Replay:
    recipe = parameter_groups(parameter_shapes(config.model), config.optimizer)
    options.setdefault("engine", engine(name))
    return simulate(name, rank, world_size, lambda: GPT(config.model), recipe, batch, **options)


# On real ranks every allocation is counted by the allocator itself. The model's sizes divide by neither world size.

BATCH = (4, 32)


def small(world_size: int) -> tuple[Config, tuple[int, int], int]:
    """What is trained, its batch, and accumulation. The peak of two ranks is at the loss, among activations; that of
    three ranks, with few tokens of few kinds, is inside a block, among gradients and what is sent.
    """
    if world_size == 2:
        return Case(optimizer="adamw").config(), BATCH, 1
    config = Case(optimizer="muon", tied=True).config()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=31)), (1, 16), 2


@pytest.fixture(scope="session")
def counter(tmp_path_factory: pytest.TempPathFactory) -> str:
    if sys.platform != "linux" or compiler() is None:
        pytest.skip("counting real allocations needs a C++ compiler and Linux")
    return str(build(tmp_path_factory.mktemp("allocator")))


def measured(library: str, name: str, precision: Any) -> dict[str, int]:
    """On a rank: bytes alive at the moments of the second step, and the most during forward and backward."""
    allocator = install(library)
    config, batch, accumulation = small(dist.get_world_size())
    gc.collect()
    before = allocator.live_bytes()
    alive: dict[str, int] = {}
    peaks: list[int] = []
    phases = [(0, "prepare")]

    def enter(step: int, phase: str) -> None:
        time.sleep(0.05)  # gloo's threads let go of their tensors a moment after a collective is over
        last_step, last = phases[-1]
        if last == "prepare" or last_step == 1:
            alive[f"after {last}"] = allocator.live_bytes() - before
        if last_step == 1 and last in PASSES:
            peaks.append(allocator.peak_bytes() - before)
        allocator.reset_peak()
        phases.append((step, phase))

    with ExitStack() as patches:
        for collective in COLLECTIVES:
            if hasattr(dist, collective):  # a pause, so that gloo's hold is gone before anything else is allocated
                patches.enter_context(mock.patch.object(dist, collective, with_pause(getattr(dist, collective))))
        place = Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
        if precision == "fp16":
            allow_fp16()
        strategy = catalogue.engine(name, Settings(place, precision, engine(name)))
        if isinstance(strategy.loss_scale, DynamicLossScale):
            strategy.loss_scale.value = 128.0  # torch's own initial weights overflow with more
        recipe = parameter_groups(parameter_shapes(config.model), config.optimizer)
        train(strategy, GPT(config.model), recipe, batch, 1.0, accumulation, 2, enter)
    return {**alive, "peak": max(peaks)}


def with_pause(collective: Any) -> Any:
    @functools.wraps(collective)
    def paused(*args: Any, **kwargs: Any) -> Any:
        result = collective(*args, **kwargs)
        time.sleep(0.03)
        return result

    return paused


PLACES = [
    (name, world_size, ("fp32", "bf16")[(STRATEGIES.index(name) + world_size) % 2])
    for name in STRATEGIES
    for world_size in (2, 3)
]
"""Both precisions under every strategy, at both world sizes, but not every one of these at each: a neighbouring
strategy has the other half."""


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "world_size", "precision"), [*PLACES, ("fsdp", 2, "fp16"), ("zero2", 3, "fp16")])
def test_simulated_is_measured(ranks: RankPool, counter: str, name: str, world_size: int, precision: Any) -> None:
    """To the byte, but for what the tracer cannot see, which is named here."""
    config, batch, accumulation = small(world_size)
    real = ranks.run(world_size, measured, counter, name, precision)
    rank = world_size - 1
    options = {"accumulation": accumulation, "precision": precision, "emulate_gloo": True}
    simulation = simulated(name, rank, world_size, config, batch, **options)
    mesh = 4 * world_size if name == "fsdp" else 0  # the device mesh is a real tensor of int32
    numbers = 16 if config.model.softcap else 0  # softcap · tanh(logits / softcap): autograd keeps two float64 scalars
    unseen = {"after prepare": mesh, "after forward": mesh + numbers, "after backward": mesh, "after step": mesh}
    unseen["peak"] = mesh + numbers
    remainder = {moment: real[rank][moment] - sum(held.values()) for moment, held in simulation.moments.items()}
    assert remainder == unseen


# Where no ranks can go: the formulas of predict.py and traffic.py, which know nothing of engines.


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "bf16") for name in STRATEGIES), ("zero1", "fp16"), ("zero3", "fp16")]
)
def test_simulated_is_predicted(name: str, precision: Any) -> None:
    """The last of 64 ranks: what it holds and what it sends, in an uneven model under Muon."""
    config = Case(optimizer="muon").config()
    rank, world_size, accumulation = 63, 64, 2
    shapes = parameter_shapes(config.model)
    recipe = parameter_groups(shapes, config.optimizer)
    groups = [Group(group.name, group.parameters, group.rule.whole_matrix) for group in recipe]
    run = Scenario(name, shapes, groups, world_size, precision, accumulation, engine(name))
    simulation = simulated(name, rank, world_size, config, BATCH, accumulation=accumulation, precision=precision)
    for moment, held in predict_memory(run)[rank].items():
        for category in ("parameters", "master parameters", "gradients", "optimizer states"):
            if (name, category) == ("ddp", "gradients") and moment != "after backward":
                continue  # DDP's buckets are views' gradients then, and stay allocated without them
            assert simulation.moments[moment].get(category, 0) == held.get(category, 0), (moment, category)
    predicted: Counter[tuple[str, bool]] = Counter()
    for entry in predict_traffic(run, rank):
        predicted[entry.collective, entry.purpose == "bookkeeping"] += entry.payload_bytes
    sent = {(k.split()[0], "bookkeeping" in k): bytes for k, (_, bytes) in simulation.collectives.items()}
    assert sent == predicted


class LikeNanoGPT(GPT):
    """Without biases, and with the loss taken in the dtype of the logits."""

    def __init__(self, checkpointing: Any) -> None:
        super().__init__(dataclasses.replace(PRESETS["gpt2"][1].model, bias=False, checkpointing=checkpointing))
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.bias = None

    def _readable(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


@pytest.mark.parametrize(
    ("name", "world_size", "checkpointing", "engine", "mebibytes"),
    [
        ("fsdp", 64, "none", engine("fsdp"), 4803.2),
        ("fsdp", 8, "block", engine("fsdp"), 2792.8),
        ("zero3", 8, "none", engine("zero3", reduce_bucket_size=50_000_000), 5261.2),
    ],
)
def test_another_trackers_figures(
    name: str, world_size: int, checkpointing: str, engine: Any, mebibytes: float
) -> None:
    """124M parameters, 8 × 1024 tokens, AdamW, bf16: taken once with torch's MemTracker on an equal model."""
    shapes = {name: tuple(p.shape) for name, p in LikeNanoGPT(checkpointing).named_parameters()}
    recipe = parameter_groups(shapes, PRESETS["gpt2"][1].optimizer)
    simulation = simulate(name, 0, world_size, lambda: LikeNanoGPT(checkpointing), recipe, (8, 1024), engine=engine)
    assert simulation.peak_total / MiB == pytest.approx(mebibytes, rel=2e-4)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2 ** (20 if sys.platform == "linux" else 30)


def test_floating_point_operations() -> None:
    """6 per parameter of a matrix product and token, and 12 · layers · time · width per token for attention; here the
    backward pass of flash attention computes its scores again, which makes that 14 (Dao, arXiv 2205.14135).
    """
    config = PRESETS["gpt2"][1]
    simulation = simulated("single", 0, 1, config, (8, 1024))
    flops = sum(e.flops for e in simulation.events if e.step == 1 and e.phase in PASSES)
    width, layers, tokens = 768, 12, 8 * 1024
    matrices = layers * 12 * width**2 + 50304 * width
    assert flops == tokens * (6 * matrices + 14 * layers * 1024 * width)


@pytest.mark.slow
def test_a_rank_of_a_thousand() -> None:
    simulation = simulated("zero3", 1023, 1024, Case().config(), BATCH)
    assert simulation.peak["parameters"] == 2 * sum(
        -(-p.numel() // 1024) for p in GPT(Case().config().model).parameters()
    )


def test_a_document_mask_costs_what_it_does_on_a_gpu() -> None:
    """The memory-efficient kernel takes a mask as numbers: made once per block, and kept for backward."""
    config = Case(optimizer="adamw").config()
    recipe = parameter_groups(parameter_shapes(config.model), config.optimizer)
    run = {
        start: simulate("single", 0, 1, lambda: GPT(config.model, document_start=start), recipe, BATCH)  # noqa: B023
        for start in (None, 0)
    }
    operators = {e.tag.split()[-1] for e in run[0].events}
    assert "_scaled_dot_product_efficient_attention" in operators
    assert "_scaled_dot_product_flash_attention" not in operators
    assert "_scaled_dot_product_flash_attention" in {e.tag.split()[-1] for e in run[None].events}
    assert run[0].peak["activations"] > run[None].peak["activations"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "zero4"}, "no strategy 'zero4'"),
        ({"rank": 8}, "no rank 8 of 8"),
        ({"steps": 1}, "second step"),
        ({"name": "zero2", "engine": engine("zero2", offload_optimizer={"device": "cpu"})}, "offload_optimizer"),
        ({"name": "fsdp", "engine": {"offload": True}}, "fsdp_offload_params"),
        ({"model": lambda: torch.compile(nn.Linear(2, 2))}, "torch.compile"),
    ],
)
def test_where_a_simulation_cannot_go(changes: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"name": "ddp", "rank": 0, "world_size": 8, "model": lambda: nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=sentence):
        simulate(**{**arguments, "recipe": [], "batch": (1, 1), **changes})


# The tracer by itself, on real tensors.


def log(body: Any) -> list[Event]:
    tracer = Tracer({})
    with tracer:
        tracer.enter(0, "forward")
        body(tracer)
    return tracer.events


def test_every_storage_is_one_allocation_and_one_release() -> None:
    def body(tracer: Tracer) -> None:
        a = torch.zeros(100)
        b = a.view(10, 10)  # no allocation
        a += 1  # none either
        del a
        c = b * 2
        del b
        tracer.mark([c], "gradients")
        c.untyped_storage().resize_(0)
        c.untyped_storage().resize_(1200)

    lines = [(e.kind, e.bytes, e.category) for e in log(body) if e.kind != "compute"]
    assert lines == [
        ("alloc", 400, ""),
        ("alloc", 400, "gradients"),
        ("free", 400, ""),
        ("free", 400, ""),
        ("alloc", 1200, ""),
        ("free", 1200, ""),
    ]


def test_gradients_that_meet_are_added_in_place() -> None:
    """As without a tracer: three gradients of x meet, and the sums take the first one's block."""

    def body(tracer: Tracer) -> None:
        x = torch.ones(100, requires_grad=True)
        loss = ((x * 2).sum() + (x * 3).sum() + (x * 4).sum()) * 1.0
        tracer.enter(0, "backward")
        loss.backward()
        tracer.enter(0, "step")
        del x, loss

    alive = most = 0
    for event in log(body):
        if event.phase == "backward" and event.bytes == 400:
            alive += {"alloc": 1, "free": -1}.get(event.kind, 0)
            most = max(most, alive)
    assert most == 2  # out of place it would be three
    assert alive == 1


def test_allocations_say_who_made_them() -> None:
    config = Case(optimizer="adamw").config()
    simulation = simulated("fsdp", 0, 8, config, BATCH)
    tags = {e.tag for e in simulation.events if e.kind == "alloc" and e.step == 1}
    assert {"blocks.1.mlp.up mm", "blocks.1.mlp relu"} <= tags
    backward = {e.tag for e in simulation.events if e.kind == "compute" and e.phase == "backward" and e.flops}
    assert {"blocks.0.attention.q mm", "head mm"} <= backward
    assert {e.stream for e in simulation.events} >= {"compute", "all_gather", "reduce_scatter"}
    alive = Counter(e.id for e in simulation.events if e.kind in ("alloc", "free"))
    assert max(alive.values()) == 2
    assert sum(size for _, size in simulation.largest) == simulation.peak_total
