"""What a rank holds, measured from `held()`, is what formulas say, to the byte; and nothing else is alive."""

import gc
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardrun.certify.equivalence import Case
from speedrun.train import untimed_steps
from strategies.base import Precision
from strategies.checkpoint.folder import find_checkpoint
from strategies.checkpoint.format import read_index
from strategies.checkpoint.load import load
from strategies.checkpoint.save import Saver
from strategies.layout import Shape, equal_cuts, flat_partition, flat_partition_size, row_blocks
from strategies.ledger.memory import measure
from strategies.owners import assign_owners
from tests.ranks import RankPool
from tests.strategies.small import STRATEGIES, batch, build, forward_backward, make, prepared, recipe_of, shapes_of

MOMENTS = ("start", "between", "before step", "after step")
"""Prepared; between two micro-batches; after the last backward pass; after the step."""

FLOAT32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
"""DeepSpeed's setting; ZeRO-1 in bf16 is then another class of its optimizers."""

Books = dict[str, dict[str, int]]
"""Moment → category → bytes; what is zero is left out."""

STEP_COUNT = 4
"""Bytes of AdamW's step count: one float32 for each holder."""


def numel(shape: Shape) -> int:
    return math.prod(shape)


def expected(name: str, precision: Precision, case: Case, rank: int, world_size: int, accumulate: bool) -> Books:
    """The formulas: from shapes, world size and dtypes alone. accumulate: DeepSpeed with float32 accumulation."""
    shapes = shapes_of(case)
    # A group of the recipe: is it Muon's, and its parameters.
    groups = [(group.rule.whole_matrix, {key: shapes[key] for key in group.parameters}) for group in recipe_of(case)]
    elements = sum(numel(shape) for shape in shapes.values())
    width = 2 if precision == "bf16" else 4
    if name == "ddp":
        return expected_ddp(groups, elements, rank, world_size)
    if name.startswith("fsdp"):
        return expected_fsdp(groups, elements, rank, world_size)
    if name == "zero3":
        parts = [sum(math.ceil(numel(s) / world_size) for s in group.values()) for _, group in groups]
        assert all(equal_cuts(shape, world_size)[0].numel for shape in shapes.values())
        always = {
            "parameters": width * sum(parts),
            "master parameters": 4 * sum(parts),
            "gradients": (4 if accumulate else width) * sum(parts),  # allocated at the start and kept
            "communication buffers": width * elements,  # the reduce bucket, capped at the model's size
        }
        return {moment: {**always, **flat_states(groups, parts, moment)} for moment in MOMENTS}

    parts = [flat_partition_size([numel(s) for s in group.values()], world_size) for _, group in groups]
    always = {"parameters": width * world_size * sum(parts), "master parameters": 4 * sum(parts)}
    books = {moment: {**always, **flat_states(groups, parts, moment)} for moment in MOMENTS}
    # A reduced gradient is a list of views of whole gradients: those of every parameter that the partition touches,
    # also of one that it touches with an end only, and zeros for its padding.
    touched = padding = 0
    for (_, group), part in zip(groups, parts, strict=True):
        mine = {key: cuts[rank].numel for key, cuts in flat_partition(group, world_size).items() if cuts[rank].numel}
        touched += sum(numel(group[key]) for key in mine)
        padding += part - sum(mine.values())
    if accumulate and name == "zero1":
        for moment in MOMENTS:
            books[moment]["gradients"] = 4 * world_size * sum(parts)
        for moment in MOMENTS[1:3]:
            books[moment]["gradients"] += width * elements  # of the micro-batch, before it is added up
    elif accumulate:
        for moment in MOMENTS[1:3]:
            books[moment]["gradients"] = 4 * sum(parts)
    else:
        books["before step"]["gradients"] = width * (touched + padding)
        if name == "zero1":
            books["between"] |= {"gradients": width * elements, "communication buffers": width * elements}
        else:
            books["between"]["gradients"] = width * touched
    return books


def expected_ddp(groups: list[tuple[bool, dict[str, Shape]]], elements: int, rank: int, world_size: int) -> Books:
    matrices = {key: shape for muon, group in groups if muon for key, shape in group.items()}
    owners = assign_owners(matrices, world_size)
    owned = sum(numel(shape) for key, shape in matrices.items() if owners[key] == rank)
    others = [numel(shape) for muon, group in groups if not muon for shape in group.values()]
    buckets = {"gradients": 4 * sum(others)}
    states = {"optimizer states": 4 * owned + 8 * sum(others) + STEP_COUNT * len(others)}
    gradients, parameters = {"gradients": 4 * elements}, {"parameters": 4 * elements}
    return {
        "start": parameters,
        "between": {**parameters, **gradients},
        "before step": {**parameters, **gradients},
        "after step": {**parameters, **buckets, **states},
    }


def expected_fsdp(groups: list[tuple[bool, dict[str, Shape]]], elements: int, rank: int, world_size: int) -> Books:
    padded = states = 0
    for muon, group in groups:
        for shape in group.values():
            padded += math.ceil(shape[0] / world_size) * numel(shape[1:])  # a short shard has the longest one's storage
            if mine := row_blocks(shape, world_size)[rank].numel:
                states += 4 * mine if muon else 8 * mine + STEP_COUNT
    parameters = {"parameters": 4 * padded}
    return {
        "start": parameters,
        "between": {**parameters, "gradients": 4 * elements},  # unsharded, and in float32 also where the model is bf16
        "before step": {**parameters, "gradients": 4 * padded},
        "after step": {**parameters, "optimizer states": states},
    }


def flat_states(groups: list[tuple[bool, dict[str, Shape]]], parts: list[int], moment: str) -> dict[str, int]:
    """ZeRO: one holder per group, padding included."""
    if moment != "after step":
        return {}
    sizes = [4 * part if muon else 8 * part + STEP_COUNT for (muon, _), part in zip(groups, parts, strict=True)]
    return {"optimizer states": sum(sizes)}


Storage = tuple[int, int]
"""Address and bytes."""


def alive() -> dict[Storage, str]:
    """The storages of all float tensors of at least 1 KiB that Python can see in this process, described."""
    time.sleep(0.02)  # gloo's threads let go of a collective's tensors a moment after it is done
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.is_floating_point() and not thing.is_meta:
            storage = (thing.to_local() if hasattr(thing, "to_local") else thing).untyped_storage()
            if storage.nbytes() >= 1024:
                found[storage.data_ptr(), storage.nbytes()] = f"{thing.dtype} {tuple(thing.shape)}"
    return found


def unexplained(held: dict[str, list[Tensor]], before: dict[Storage, str]) -> list[str]:
    """What is alive beside `held` and was not there before."""
    named = {
        (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        for tensors in held.values()
        for tensor in tensors
    }
    rest: list[str] = []
    for _ in range(10):  # see `alive`
        rest = [what for storage, what in alive().items() if storage not in named and storage not in before]
        if not rest:
            break
    return rest


def keep_books(name: str, precision: Precision, case: Case, accumulate: bool) -> list[tuple[str, dict[str, int]]]:
    """On a rank: two steps of two micro-batches; the measured books at every moment, nothing being unexplained."""
    before = alive()
    strategy: Any = prepared(make(name, precision, FLOAT32_ACCUMULATION if accumulate else None), case)
    books = []

    def enter(moment: str) -> None:
        held = strategy.held()
        books.append((moment, {category: size for category, size in measure(held).items() if size}))
        assert not (rest := unexplained(held, before)), f"{moment}: {rest}"

    enter("start")
    for step in range(2):
        forward_backward(strategy, 2 * step, last=False)
        enter("between")
        forward_backward(strategy, 2 * step + 1, last=True)
        enter("before step")
        strategy.step()
        enter("after step")
    return books


def check(ranks: RankPool, world_size: int, name: str, precision: Precision, case: Case, accumulate: bool) -> None:
    for rank, books in enumerate(ranks.run(world_size, keep_books, name, precision, case, accumulate)):
        formula = expected(name, precision, case, rank, world_size, accumulate)
        for entry, (moment, measured) in enumerate(books):
            predicted = dict(formula[moment])
            if entry > 3 and "optimizer states" in formula["after step"]:  # in the second step there is state
                predicted["optimizer states"] = formula["after step"]["optimizer states"]
            assert measured == predicted, f"rank {rank}, {moment} ({entry}): {measured} is not {predicted}"


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("name", (*STRATEGIES, "fsdp_no_reshard"))
def test_a_rank_holds_what_the_formulas_say(ranks: RankPool, name: str, precision: Precision) -> None:
    """Tied on two ranks in the one precision and on three in the other, untied the other way round."""
    for tied in (False, True):
        world_size = 2 if tied == (precision == "bf16") else 3
        check(ranks, world_size, name, precision, Case(accumulation=2, tied=tied), accumulate=False)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ("zero1", "zero2", "zero3"))
def test_a_rank_that_accumulates_in_float32_holds_what_the_formulas_say(ranks: RankPool, name: str) -> None:
    check(ranks, 3, name, "bf16", Case(accumulation=2), accumulate=True)


def leftovers(strategy: Any, before: dict[Storage, str]) -> list[str]:
    """What is alive in no category, and the optimizer states that DeepSpeed has linked to parameters and that are not
    the ones which the optimizer uses. (Stage 3 links none.)"""
    held = strategy.held()
    used = {state.untyped_storage().data_ptr() for state in held["optimizer states"]}
    linked = [
        (name, key, fragment.untyped_storage().data_ptr())
        for name, p in strategy.engine.module.named_parameters()
        if getattr(p, "_hp_mapping", None) is not None
        for key, fragment in (p._hp_mapping.optim_fragment or {}).items()
    ]
    assert linked or strategy.name == "zero3"
    stale = [f"{key} of {name} is not the optimizer's" for name, key, address in linked if address not in used]
    return stale + unexplained(held, before)


def after_a_warm_up(
    name: str, precision: Precision, accumulate: bool, case: Case, folder: Path, resume: bool
) -> list[str]:
    """On a rank: what is left over in a run after its warm-up and two steps; it saves a checkpoint, or resumes one."""
    before = alive()
    strategy: Any = prepared(make(name, precision, FLOAT32_ACCUMULATION if accumulate else None), case)
    untimed_steps(strategy, 2, partial(forward_backward, strategy, 0))  # type: ignore[arg-type]
    if resume:
        load(find_checkpoint(folder), read_index(find_checkpoint(folder)), strategy)
    for group in strategy.optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    for step in range(2):
        forward_backward(strategy, step)
        strategy.step()
    if not resume:
        saver = Saver(folder, name, precision, strategy.optimizer)
        saver.save(2, {"note": "a test"})
        saver.wait()
        assert saver.failure is None, saver.failure
        del saver
    return leftovers(strategy, before)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "precision", "accumulate"),
    [
        *((name, precision, False) for name in ("zero1", "zero2", "zero3") for precision in ("bf16", "fp32")),
        ("zero1", "bf16", True),
    ],
)
def test_nothing_is_left_of_a_warm_up(
    ranks: RankPool, tmp_path: Path, name: str, precision: Precision, accumulate: bool
) -> None:
    """DeepSpeed links optimizer states to parameters in an engine's first step and never again: states that were made
    anew after the warm-up would leave the linked ones alive for good, 8 bytes for every element of their group."""
    for resume in (False, True):
        run = (name, precision, accumulate, Case(record=True), tmp_path, resume)
        for rank, left in enumerate(ranks.run(2, after_a_warm_up, *run)):
            assert not left, f"rank {rank}, {resume=}: {left}"


def evaluate(precision: Precision) -> dict[str, int]:
    strategy: Any = prepared(make("fsdp", precision), Case())
    with strategy.evaluation():
        strategy.model(*batch(0, dist.get_rank()))
    return measure(strategy.held())


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_fsdp_lets_go_of_all_gathered_parameters_after_an_evaluation(ranks: RankPool, precision: Precision) -> None:
    shards = expected("fsdp", precision, Case(), 0, 2, False)["start"]["parameters"]
    assert ranks.run(2, evaluate, precision)[0]["parameters"] == shards


def leave_something_lying_about() -> list[str]:
    before = alive()
    stray = torch.zeros(300)
    view = torch.zeros(400)[:3]
    kept = torch.zeros(500)
    return sorted(unexplained({"parameters": [kept[:1]]}, before)) + [str(stray.numel() + view.numel())]


@pytest.mark.ranks
def test_the_walk_finds_what_no_category_names(ranks: RankPool) -> None:
    assert ranks.run(1, leave_something_lying_about)[0] == ["torch.float32 (3,)", "torch.float32 (300,)", "303"]


def test_a_storage_counts_once_and_whole() -> None:
    buffer, model = torch.zeros(100), build(Case(tied=True))
    held = {"parameters": [*model.parameters(), model.head.weight], "gradients": [buffer[:10], buffer[50:]], "none": []}
    elements = sum(p.numel() for p in model.parameters())
    assert measure(held) == {"parameters": 4 * elements, "gradients": 400, "none": 0}
    assert measure({"first": [buffer], "second": [buffer]}) == {"first": 400, "second": 0}
