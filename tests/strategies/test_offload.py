"""Offload to host memory: it changes where things lie, and nothing that is computed.

On a CPU both memories are one, and a strategy that ignored the setting would compute the same. So what belongs on the
host is asserted here by what a strategy says of itself and by the engines' own objects, and on fake GPUs, where every
tensor says where it lies, in tests/rehearsal/test_offload.py.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardrun.certify.equivalence import Case, Trace, compare, run_reference, run_strategy
from speedrun.books.shapes import ledger_groups
from speedrun.optim.policy import ParameterGroup
from strategies import catalogue
from strategies.base import Precision, Settings
from strategies.checkpoint.folder import find_checkpoint
from strategies.checkpoint.format import read_index
from strategies.checkpoint.load import load
from strategies.checkpoint.save import Saver
from strategies.forecast.predict import predict_after_forward, predict_host, predict_memory, predict_states
from strategies.forecast.traffic import predict_traffic
from strategies.fsdp.engine import FSDP
from strategies.layout import flat_partition, flat_partition_size, row_blocks
from strategies.ledger.memory import measure_apart
from strategies.ledger.terms import CATEGORIES, Held, Scenario
from strategies.ledger.wire import Meter
from strategies.zero.offload import check_offload, refusals
from tests.ranks import RankPool
from tests.strategies.ledger.test_books import totals
from tests.strategies.small import batch, forward_backward, place, prepared, recipe_of, shapes_of
from tests.strategies.test_held import alive, unexplained

OPTIMIZER: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
PARAMETERS: dict[str, Any] = {"offload_param": {"device": "cpu"}}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp": ("fsdp", {"reshard_after_forward": True, "wrap": ["Block"], "offload": True}),
    "zero1": ("zero1", {"zero_optimization": {"stage": 1, **OPTIMIZER}}),
    "zero2": ("zero2", {"zero_optimization": {"stage": 2, **OPTIMIZER}}),
    "zero3": ("zero3", {"zero_optimization": {"stage": 3, **OPTIMIZER}}),
    "zero3 all": ("zero3", {"zero_optimization": {"stage": 3, **OPTIMIZER, **PARAMETERS}}),
    "zero3 parameters": ("zero3", {"zero_optimization": {"stage": 3, **PARAMETERS}}),
}
"""Name → strategy, and its engine's settings."""


def make(variant: str, precision: Precision = "fp32", offload: bool = True) -> Any:
    name, engine = VARIANTS[variant]
    if not offload:
        engine = {key: value for key, value in engine.items() if key != "offload"}
        if zero := engine.get("zero_optimization"):
            engine["zero_optimization"] = {"stage": zero["stage"]}
    return catalogue.engine(name, Settings(place(), precision, engine))


def train(variant: str, cases: list[Case]) -> list[Trace]:
    return [run_strategy(case, make(variant), dist.get_rank(), dist.get_world_size()) for case in cases]


def cases(world_size: int) -> list[Case]:
    """Both optimizers and accumulations at either world size; the record has NorMuon, whose states are of matrices."""
    pair = [("muon", 2), ("adamw", 1)] if world_size == 2 else [("muon", 1), ("adamw", 2)]
    plain = [Case(optimizer=o, accumulation=a, tied=a == 1, rows=12, steps=3) for o, a in pair]
    return [*plain, *([Case(record=True, rows=12, steps=3)] if world_size == 3 else [])]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", (2, 3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_offload_equals_the_single_process_run(ranks: RankPool, variant: str, world_size: int) -> None:
    asked = cases(world_size)
    for case, trace in zip(asked, ranks.run(world_size, train, variant, asked)[0], strict=True):
        verdict = compare(trace, run_reference(case))
        assert verdict.equal, f"{case}: {verdict}"


# What lies where.


def expected_host(variant: str, case: Case, precision: Precision, rank: int, ranks: int) -> Held:
    """Formulas for what a rank keeps in host memory just before its second update, on a CPU."""
    shapes, width = shapes_of(case), 2 if precision == "bf16" else 4
    groups = [(group.rule.whole_matrix, {n: shapes[n] for n in group.parameters}) for group in recipe_of(case)]
    numels = [[math.prod(shape) for shape in group.values()] for _, group in groups]
    name = VARIANTS[variant][0]
    if name == "fsdp":
        padded = states = 0
        for muon, group in groups:
            for shape in group.values():
                padded += math.ceil(shape[0] / ranks) * math.prod(shape[1:])
                if mine := row_blocks(shape, ranks)[rank].numel:
                    states += 4 * mine if muon else 8 * mine + 4
        return {"parameters": 4 * padded, "gradients": 4 * padded, "optimizer states": states}
    if name == "zero3":
        parts = [sum(math.ceil(numel / ranks) for numel in each) for each in numels]
    else:
        parts = [flat_partition_size(each, ranks) for each in numels]
    states = sum(4 * part if muon else 8 * part + 4 for (muon, _), part in zip(groups, parts, strict=True))
    whole = sum(parts)
    cuts = {"parameters": width * whole} if "offload_param" in VARIANTS[variant][1]["zero_optimization"] else {}
    if variant == "zero3 parameters":
        return cuts
    masters = {"master parameters": 4 * whole, "optimizer states": states}
    if name == "zero3":
        return {**cuts, **masters, "gradients": (width + 4) * whole}
    touched = 0
    if name == "zero2" and case.accumulation > 1:
        for _, group in groups:
            touched += sum(math.prod(group[n]) for n, c in flat_partition(group, ranks).items() if c[rank].numel)
    largest = max(map(math.prod, shapes.values()))
    return {**masters, "gradients": 4 * whole + width * touched, "communication buffers": width * (largest + whole)}


Books = dict[str, tuple[Held, Held]]
"""Moment → bytes by category on the device, and on the host."""


def keep_books(settings: list[tuple[str, Case, Precision]]) -> list[tuple[Books, Any]]:
    """On a rank: what is held at every moment of the third step, and sent in it; nothing is left unexplained."""
    found = []
    for variant, case, precision in settings:
        before = {} if found else alive()
        strategy = prepared(make(variant, precision), case)
        books: Books = {}

        def note(moment: str, strategy: Any = strategy, books: Books = books) -> None:
            books[moment] = measure_apart(strategy.held(), strategy.offloaded(), place().device)

        note("after prepare")
        for step in range(3):
            with Meter() as meter:
                for i in range(case.accumulation):
                    with strategy.micro_batch(last=i == case.accumulation - 1):
                        loss = strategy.model(*batch(step, dist.get_rank()))
                        note("after forward")
                        strategy.backward(loss)
                note("after backward")
                strategy.step()
            del loss
            note("after step")
        if not found:  # it takes long
            assert not (rest := unexplained(strategy.held(), before)), rest
        found.append((books, meter.lines()))
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", (2, 3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_memories_and_the_wire_are_as_predicted_to_the_byte(
    ranks: RankPool, variant: str, world_size: int
) -> None:
    settings: list[tuple[str, Case, Precision]] = [(variant, Case(accumulation=2, tied=True), "bf16")]
    if world_size == 3:
        settings = [(variant, Case(optimizer="adamw"), "fp32"), (variant, Case(record=True, accumulation=2), "fp32")]
    name, engine = VARIANTS[variant]
    for rank, measured in enumerate(ranks.run(world_size, keep_books, settings)):
        for (_, case, precision), (books, sent) in zip(settings, measured, strict=True):
            about = (world_size, precision, case.accumulation, engine)
            run = Scenario(name, shapes_of(case), ledger_groups(case.config()), *about, host_apart=False)
            device = {**predict_memory(run)[rank], "after forward": predict_after_forward(run)[rank]}
            host = predict_host(run)[rank]
            for moment, category in itertools.product(books, CATEGORIES):
                predicted = device[moment].get(category, 0), host[moment][category]
                found = tuple(side.get(category, 0) for side in books[moment])
                assert found == predicted, f"rank {rank}, {case}, {precision}, {moment}, {category}"
            assert totals(predict_traffic(run, rank)) == totals(sent), (rank, case)
            if not case.record:  # the same out of formulas that know no books
                assert books["after backward"][1] == expected_host(variant, case, precision, rank, world_size)


def test_the_states_of_a_group_are_the_same_wherever_they_lie() -> None:
    case = Case(record=True)
    for name, engine in VARIANTS.values():
        run = Scenario(name, shapes_of(case), ledger_groups(case.config()), 3, engine=engine)
        plain = {"zero_optimization": {"stage": int(name[-1])}} if name != "fsdp" else {"wrap": ["Block"]}
        stays = Scenario(name, shapes_of(case), ledger_groups(case.config()), 3, engine=plain)
        assert predict_states(run) == predict_states(stays)
        assert not predict_host(stays)


def test_from_a_gpu_fsdp_brings_gradients_without_padding() -> None:
    case = Case()
    run = Scenario("fsdp", shapes_of(case), ledger_groups(case.config()), 3, engine=VARIANTS["fsdp"][1])
    for rank, held in enumerate(predict_host(run)):
        mine = sum(row_blocks(shape, 3)[rank].numel for shape in shapes_of(case).values())
        assert held["after backward"]["gradients"] == 4 * mine


# The engines were told.


def told(variant: str) -> list[str]:
    strategy = prepared(make(variant), Case())
    if isinstance(strategy, FSDP):
        groups = [m._get_fsdp_state()._fsdp_param_group for m in strategy.model.modules() if hasattr(m, "unshard")]
        return sorted({type(group.offload_policy).__name__ for group in groups})
    zero = strategy.zero
    flags = ("cpu_offload", "offload_optimizer", "offload_param")
    return [flag for flag in flags if getattr(zero, flag, False) is True]


@pytest.mark.ranks
def test_the_engines_offload_too(ranks: RankPool) -> None:
    assert {variant: ranks.run(2, told, variant)[0] for variant in VARIANTS} == {
        "fsdp": ["CPUOffloadPolicy"],
        "zero1": ["cpu_offload"],
        "zero2": ["cpu_offload"],
        "zero3": ["offload_optimizer"],
        "zero3 all": ["offload_optimizer", "offload_param"],
        "zero3 parameters": ["offload_param"],
    }


# Leaving a step out, and checkpoints.


def everything(strategy: Any) -> dict[str, Tensor]:
    """All weights and states, whole, by name."""
    states = strategy.optimizer.full_state()
    flat = {f"{buffer}/{name}": t for name, state in states.items() for buffer, t in state.items()}
    return {**{f"weight/{name}": t for name, t in strategy.optimizer.full_weights().items()}, **flat}


def leave_out(variant: str, precision: Precision) -> tuple[list[str], float]:
    """What is not to the bit what it was, after a step that is left out; and the largest change of the next one."""
    case = Case(accumulation=2)
    strategy = prepared(make(variant, precision), case)
    for group in strategy.optimizer.param_groups:
        group["lr"] = group["peak_lr"]

    def passes(step: int) -> None:
        for i in range(2):
            forward_backward(strategy, 2 * step + i, last=i == 1)

    passes(0)
    strategy.step()
    before = {name: tensor.clone() for name, tensor in everything(strategy).items()}
    passes(1)
    strategy.step(update=False)
    changed = [name for name, tensor in everything(strategy).items() if not torch.equal(tensor, before[name])]
    passes(2)
    assert math.isfinite(strategy.step())
    after = everything(strategy)
    return changed, max((after[name] - before[name]).abs().max().item() for name in before if "weight/" in name)


@pytest.mark.ranks
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_left_out_changes_nothing_and_the_next_one_does(ranks: RankPool, variant: str) -> None:
    precision: Precision = "bf16" if variant in ("zero2", "zero3 all") else "fp32"
    for changed, moved in ranks.run(2, leave_out, variant, precision):
        assert not changed
        assert 0 < moved < 1


def save_or_load(variant: str, offload: bool, folder: Path, save: bool) -> dict[str, Tensor]:
    case = Case(record=True)
    strategy = prepared(make(variant, offload=offload), case)
    if save:
        forward_backward(strategy, 0)
        strategy.step()
        saver = Saver(folder, strategy.name, "fp32", strategy.optimizer)
        saver.save(1, {})
        saver.wait()
        assert saver.failure is None, saver.failure
    else:
        load(find_checkpoint(folder), read_index(find_checkpoint(folder)), strategy)
    found = everything(strategy)
    # The model computes with what was loaded: its next loss says so.
    with strategy.evaluation():
        found["loss"] = strategy.model(*batch(7, 0)).detach().clone()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_goes_there_and_back(ranks: RankPool, variant: str, tmp_path: Path) -> None:
    for offloaded in (True, False):
        folder = tmp_path / str(offloaded)
        saved = ranks.run(2, save_or_load, variant, offloaded, folder, True)[0]
        loaded = ranks.run(3, save_or_load, variant, not offloaded, folder, False)[0]
        assert set(saved) == set(loaded)
        for name, tensor in saved.items():
            torch.testing.assert_close(loaded[name], tensor, rtol=1e-6 if name == "loss" else 0, atol=0)


# What is refused.

F32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("zero", "beside", "key"),
    [
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, {}, "offload_optimizer.device 'nvme'"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, {}, "offload_optimizer.device 'nvme'"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, "offload_param.device 'nvme'"),
        ({"stage": 2, **PARAMETERS}, {}, "offload_param.device 'cpu'"),
        ({"stage": 1, "offload_optimizer": {"device": "disk"}}, {}, "offload_optimizer.device 'disk'"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {}, "offload_optimizer.ratio 0.5"),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
            {},
            "offload_optimizer.super_offload True",
        ),
        ({"stage": 1, **OPTIMIZER}, F32_SUMS, "data_types.grad_accum_dtype 'fp32'"),
        ({"stage": 2, **OPTIMIZER, "compute_grad_norm": False}, {}, "zero_optimization.compute_grad_norm False"),
    ],
)
def test_what_deepspeed_cannot_offload_for_us_is_refused(
    zero: dict[str, Any], beside: dict[str, Any], key: str
) -> None:
    with pytest.raises(ValueError, match=f"{key} is not supported: .*; (write|remove)") as error:
        check_offload({"zero_optimization": zero, **beside}, "bf16")
    assert "\n" not in str(error.value)


def test_what_it_can_is_not() -> None:
    for _, engine in VARIANTS.values():
        assert not refusals(engine, "bf16")
    assert not refusals({"zero_optimization": {"stage": 3, **OPTIMIZER}, **F32_SUMS}, "bf16")
    off = {"offload_optimizer": {"device": "none"}, "offload_param": {"device": None}}
    assert not refusals({"zero_optimization": {"stage": 1, **off}, **F32_SUMS}, "bf16")


def refused() -> str:
    engine = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}}
    recipe: list[ParameterGroup] = recipe_of(Case())
    with pytest.raises(ValueError) as error:
        prepared(catalogue.engine("zero3", Settings(place(), "fp32", engine)), Case(), recipe)
    return str(error.value)


@pytest.mark.ranks
def test_an_engine_refuses_it_before_deepspeed_starts(ranks: RankPool) -> None:
    assert "offload_optimizer.device 'nvme' is not supported" in ranks.run(1, refused)[0]
