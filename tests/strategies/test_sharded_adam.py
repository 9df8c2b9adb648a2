"""`sharded_adam` under DDP: the same numbers as without, an Nth of AdamW's state on each rank, its books complete."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from speedrun.config import CheckpointConfig, OptimizerConfig, ScheduleConfig
from strategies.owners import CUT_FROM, is_cut
from tests.ranks import RankPool
from tests.speedrun.runs import metrics, read, small, train_here

WHOLE = small(
    optimizer=OptimizerConfig(
        orthogonalization_dtype="float32",
        adamw_every=2,
        weight_decay=0.1,
        cautious_weight_decay=True,
        clip=0.5,
        normuon=True,
    ),
    schedule=ScheduleConfig(name="constant"),  # which does not depend on the number of steps
    checkpoint=CheckpointConfig(every=2),
    steps=6,
)
CUT = dataclasses.replace(WHOLE, optimizer=dataclasses.replace(WHOLE.optimizer, sharded_adam=True))


def losses(folder: Path) -> list[float]:
    return [
        line[key] for line in metrics(folder / "run") for key in ("train_loss", "val_loss", "grad_norm") if key in line
    ]


def states(folder: Path) -> list[int]:
    """Measured bytes of optimizer states after a step, by rank; nothing in the books may remain unexplained."""
    ranks = read(folder / "run", "ledger.json")["ranks"]
    for rank in ranks:
        assert [line["remainder"] for line in rank["traffic"]] == [0] * len(rank["traffic"])
    return [rank["memory"]["after step"]["optimizer states"]["measured"] for rank in ranks]


def trained(ranks: RankPool, world_size: int, name: str, config: Any, folder: Path, **fields: Any) -> Path:
    ranks.run(world_size, train_here, name, dataclasses.replace(config, out=str(folder), **fields))
    return folder


@pytest.mark.ranks
def test_it_trains_as_without_and_holds_a_part(ranks: RankPool, tmp_path: Path) -> None:
    whole = trained(ranks, 2, "ddp", WHOLE, tmp_path / "whole")
    cut = trained(ranks, 2, "ddp", CUT, tmp_path / "cut")
    assert losses(cut) == pytest.approx(losses(whole), rel=2e-5)
    assert [2 * here < 1.3 * there for here, there in zip(states(cut), states(whole), strict=True)] == [True] * 2
    moved = {line["collective"]: line["measured"] for line in read(cut / "run", "ledger.json")["ranks"][0]["traffic"]}
    assert moved["reduce_scatter"] > 0 and moved["all_gather"] == moved["reduce_scatter"]


@pytest.mark.ranks
def test_its_checkpoints_are_anybodys(ranks: RankPool, tmp_path: Path) -> None:
    """A run that is cut goes on from one that is not, and one that is not from one that is cut."""
    whole = trained(ranks, 2, "ddp", WHOLE, tmp_path / "whole")
    for name, config, folder in (("ddp", CUT, "a"), ("ddp", WHOLE, "b")):
        first = trained(ranks, 2, "ddp", CUT if config is WHOLE else WHOLE, tmp_path / folder, steps=4)
        trained(ranks, 2, name, config, first, resume="auto")
        assert losses(first)[-3:] == pytest.approx(losses(whole)[-3:], rel=1e-4)


def test_what_is_cut() -> None:
    assert is_cut((CUT_FROM // 8, 8), 4) and not is_cut((CUT_FROM // 8, 8), 3) and not is_cut((CUT_FROM - 4,), 4)
    assert not is_cut((CUT_FROM,), 1)
