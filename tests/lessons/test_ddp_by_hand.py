"""Lesson 4's hand-written DDP against one process without any framework, and against the books."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lessons import kit
from speedrun.optim.policy import parameter_groups
from strategies.forecast.predict import predict_memory
from strategies.forecast.traffic import predict_traffic
from strategies.ledger.memory import measure
from strategies.ledger.terms import Scenario
from strategies.ledger.wire import Meter
from strategies.mesh import Place
from tests.ranks import RankPool
from tests.speedrun.runs import launch_of

LESSON = Path(__file__).parent.parent.parent / "lessons" / "04_ddp"
STEPS, ACCUMULATION = 6, 2

pytestmark = pytest.mark.ranks


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, LESSON / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(place: Place, broken: str = "") -> dict[str, Any]:
    """Six steps, two micro-batches each, with torch's AdamW; by hand over the ranks, or in this process alone."""
    torch.manual_seed(place.rank)
    model, data = kit.build(), kit.open_text()
    if place.rank:
        for p in model.parameters():
            nn.init.normal_(p)  # rank 0's weights must win
    ddp = load("by_hand").HandDDP(model, bucket_bytes=2**19) if place.world_size > 1 else None
    named = dict(model.named_parameters())
    recipe = parameter_groups({name: tuple(p.shape) for name, p in named.items()}, kit.CONFIG.optimizer)
    optimizer = torch.optim.AdamW([{**g.options, "params": [named[n] for n in g.parameters]} for g in recipe])
    rows = data.global_batch // place.world_size // ACCUMULATION
    for step in range(STEPS):
        with Meter() as meter:
            for i in range(ACCUMULATION):
                first = (place.rank * ACCUMULATION + i) * rows
                if ddp:
                    ddp.sync = i == ACCUMULATION - 1
                (model(*data.batch(step, first, first + rows)) / ACCUMULATION).backward()
            if ddp:
                ddp.finish()
        if broken == "summed":
            for p in model.parameters():
                p.grad *= place.world_size
        nn.utils.clip_grad_norm_(model.parameters(), kit.CONFIG.optimizer.clip)
        optimizer.step()
        held = measure(
            {
                "parameters": list(model.parameters()),
                "gradients": [p.grad for p in model.parameters() if p.grad is not None],
                "optimizer states": [t for state in optimizer.state.values() for t in state.values()],
            }
        )
        ddp.zero_grad() if ddp else optimizer.zero_grad()
    weights = {name: p.detach().clone() for name, p in named.items()}
    return {"weights": weights, "held": held, "sent": meter.lines()}


def on_rank(broken: str = "") -> dict[str, Any]:
    return train(Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu")), broken)


def worst(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max((a["weights"][name] - b["weights"][name]).abs().max().item() for name in a["weights"])


def test_it_is_one_process_in_weights_and_the_books_in_bytes(ranks: RankPool) -> None:
    alone = train(Place(0, 1, torch.device("cpu")))
    books: Scenario = kit.launched_scenario(launch_of("ddp", 0, 2), accumulation=ACCUMULATION)
    predicted = predict_memory(books)[0]["after backward"]
    gradients = [entry for entry in predict_traffic(books) if entry.purpose == "gradients"]
    for rank in ranks.run(2, on_rank):
        assert worst(rank, alone) < 1e-5
        assert rank["held"] == {category: predicted[category] for category in rank["held"]}
        (sent,) = rank["sent"]
        assert sent.collective == "all_reduce"
        assert sent.payload_bytes == sum(entry.payload_bytes for entry in gradients)
        assert sent.calls == 4, "several buckets, or there is nothing to overlap"


def test_gradients_that_are_only_summed_are_seen(ranks: RankPool) -> None:
    """The comparison above can fail: without the division by the world size, weights are off by far more."""
    alone = train(Place(0, 1, torch.device("cpu")))
    assert worst(ranks.run(2, on_rank, "summed")[0], alone) > 1e-5


def test_a_parameter_without_a_gradient_is_named(ranks: RankPool) -> None:
    assert all(ranks.run(2, missing_gradient))


def missing_gradient() -> bool:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    ddp = load("by_hand").HandDDP(model)
    model[0](torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="2 parameters of a bucket got no gradient"):
        ddp.finish()
    return True
