"""Values at the ends of their ranges: refused or trained alike under every strategy."""

from pathlib import Path
from typing import Any

import pytest

from speedrun.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from speedrun.run.checks import check
from tests.ranks import RankPool
from tests.speedrun.runs import STRATEGIES, in_folder, launch_of, metrics, small, train_here

ALL = [("single", 1), *((name, 2) for name in STRATEGIES)]
EXACT: dict[str, Any] = {"orthogonalization_dtype": "float32"}

CASES: dict[str, dict[str, Any]] = {
    "no clipping, rates of zero, weights that decay at once": {
        "optimizer": OptimizerConfig(
            clip=0.0, muon_lr=0.5, muon_weight_decay=2.0, head_lr=0.0, embedding_lr=0.01, weight_decay=100.0, **EXACT
        ),
        "schedule": ScheduleConfig(decay=0.0),
    },
    "a clip that leaves nothing of the gradient": {"optimizer": OptimizerConfig(clip=1e-30, **EXACT)},
    "a clip that nothing reaches, one iteration, a large eps": {
        "optimizer": OptimizerConfig(clip=1e30, orthogonalization_steps=1, muon_momentum_warmup=0, eps=1.0, **EXACT),
        "schedule": ScheduleConfig(decay=1.0),
    },
    "means without memory, a warm-up as long as the run": {
        "optimizer": OptimizerConfig(
            betas=(0.0, 0.0), muon_momentum=0.0, muon_momentum_start=0.0, normuon=True, normuon_beta2=0.0, **EXACT
        ),
        "schedule": ScheduleConfig(warmup=3, final=1.0),
    },
    "AdamW once, at the end": {"optimizer": OptimizerConfig(adamw_every=3, eps=1e-30, clip=0.1, **EXACT)},
}


def of(case: dict[str, Any]) -> Config:
    model = ModelConfig(layers=2, heads=2, width=32, mlp_width=24, max_sequence_length=32, softcap=10.0**6, rope_base=1)
    data = DataConfig(sequence_length=16, global_batch=4, eval_tokens=32)
    return small(model=model, data=data, steps=3, eval_every=0, **case)


@pytest.mark.ranks
@pytest.mark.parametrize("name", CASES)
def test_what_is_allowed_trains_alike(name: str, ranks: RankPool, tmp_path: Path) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for strategy, world_size in ALL:
        ranks.run(world_size, train_here, strategy, in_folder(of(CASES[name]), tmp_path / strategy))
        lines = metrics(tmp_path / strategy / "run")
        curves[strategy] = [(line["train_loss"], line["grad_norm"]) for line in lines[1:]]
        curves[strategy].append((lines[-1]["val_loss"], 1.0))
    for strategy, curve in curves.items():
        for found, expected in zip(curve, curves["single"], strict=True):
            assert found == pytest.approx(expected, rel=2e-4), (strategy, curves)


@pytest.mark.parametrize(("strategy", "world_size"), ALL)
def test_what_is_refused_is_refused_under_every_strategy(strategy: str, world_size: int) -> None:
    for field, config in {
        "optimizer.clip": small(optimizer=OptimizerConfig(clip=-1.0)),
        "optimizer.betas": small(optimizer=OptimizerConfig(betas=(0.9, 1.0))),
        "schedule.warmup": small(schedule=ScheduleConfig(warmup=-1)),
        "model.softcap": small(model=ModelConfig(softcap=-5.0)),
        "untimed_steps": small(untimed_steps=-1),
        "collective_timeout": small(collective_timeout=0.0),
    }.items():
        with pytest.raises(ValueError, match=rf"^{field} is .*, but (each )?must be "):
            check(config, launch_of(strategy, 0, world_size))
