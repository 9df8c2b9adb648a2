"""A model that starts on the meta device: every strategy gives it the whole initialisation's numbers, to the bit, and
one that shards never builds it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardrun.certify.equivalence import Case
from speedrun.model import GPT
from strategies import start
from strategies.base import Precision, Strategy
from strategies.optimizer import local
from strategies.zero import cut
from tests.ranks import RankPool
from tests.strategies.small import build, make, prepared, recipe_of

TIED, RECORD = Case(optimizer="muon", tied=True), Case(optimizer="muon", record=True, steps=6)
"""A tied head; all features, with parameters of one element and of the identity. Their sizes divide by nothing."""

Variant = tuple[str, Precision, dict[str, Any]]
SHARDED: tuple[Variant, ...] = (
    ("fsdp", "fp32", {}),
    ("fsdp", "bf16", {}),
    ("zero3", "fp32", {}),
    ("zero3", "bf16", {}),
)
OFFLOADED: tuple[Variant, ...] = (
    ("fsdp", "fp32", {"engine": {"offload": True}}),
    ("zero2", "bf16", {"offload_optimizer": {"device": "cpu"}}),
    ("zero3", "bf16", {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    ("zero3", "fp32", {"stage3_param_persistence_threshold": 500, "sub_group_size": 3000}),
)
WHOLE: tuple[Variant, ...] = (
    ("ddp", "bf16", {}),
    ("zero1", "fp32", {}),
    ("zero1", "bf16", {}),
    ("zero2", "bf16", {}),
)
REPLICAS: tuple[Variant, ...] = (("hsdp", "fp32", {}), ("zero3", "fp32", {"zero_hpz_partition_size": 2}))


def computed_with(strategy: Strategy) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this rank before any step, and the weights that the optimizer has, whole, on every rank."""
    tokens = torch.arange(32).view(2, 16) % 256
    with strategy.evaluation():
        loss = strategy.model(tokens, tokens).float()
    return loss, strategy.optimizer.full_weights()


def started(variants: tuple[Variant, ...], case: Case) -> list[str]:
    """On a rank: what is not as it is where prepare gets a model that is there already."""
    wrong = []
    whole = {name: p.detach() for name, p in build(case).named_parameters()}
    for name, precision, options in variants:
        about = f"{name} {precision} {options}"
        loss, weights = computed_with(prepared(make(name, precision, **options), case))
        wrong += [f"{about}: {n}" for n, weight in weights.items() if not torch.equal(weight, whole[n])]
        other = make(name, precision, **options)
        other.prepare(build(case), recipe_of(case), case.config().optimizer.clip, case.accumulation)
        expected, weights = computed_with(other)
        wrong += [f"{about}, built: {n}" for n, weight in weights.items() if not torch.equal(weight, whole[n])]
        wrong += [f"{about}: loss {loss} and not {expected}"] * (not torch.equal(loss, expected))
    return wrong


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world_size", "variants", "case"),
    [(2, OFFLOADED, TIED), (2, SHARDED, RECORD), (3, WHOLE, RECORD), (3, SHARDED, TIED), (4, REPLICAS, TIED)],
    ids=("offloaded", "sharded-2", "whole", "sharded-3", "replicas"),
)
def test_every_strategy_begins_as_the_whole_model_does(
    ranks: RankPool, world_size: int, variants: tuple[Variant, ...], case: Case
) -> None:
    assert ranks.run(world_size, started, variants, case) == [[]] * world_size


def elements_there(name: str) -> tuple[set[int], int]:
    """On a rank: elements of the parameters that have memory, each time that values are put into one; and of a rank's
    shards at the end."""
    seen: set[int] = set()
    write = start.write_initial
    with torch.device("meta"):
        model = GPT(TIED.config().model, document_start=256)

    def look(*arguments: Any) -> None:
        seen.add(sum(local(p).numel() for p in model.parameters() if not p.is_meta))
        write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        for module in (start, cut):
            patch.setattr(module, "write_initial", look)
        strategy = make(name)
        strategy.prepare(model, recipe_of(TIED), 1.0, 1, model.initial(1))
    rank = dist.get_rank()
    return seen, sum(piece.state[rank].numel for piece in strategy.optimizer.all_slices())


@pytest.mark.ranks
def test_who_shards_never_has_the_whole_model(ranks: RankPool) -> None:
    for seen, shards in ranks.run(2, elements_there, "fsdp"):
        assert seen == {shards}
    for seen, _ in ranks.run(2, elements_there, "zero3"):
        assert seen == {0}  # what has been converted has memory as a cut alone
    whole = sum(p.numel() for p in build(TIED).parameters())
    for seen, _ in ranks.run(2, elements_there, "ddp"):
        assert max(seen) == whole


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = GPT(TIED.config().model)
    with pytest.raises(RuntimeError, match="pass prepare its initial ones"):
        start.begin(model, None, torch.device("cpu"))
