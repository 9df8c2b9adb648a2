"""The model's features under every strategy: the single-process run's numbers, and books without a remainder."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from shardrun.certify.equivalence import Case, Trace, compare, run_reference
from speedrun.config import Config, DataConfig, ModelConfig, ScheduleConfig
from speedrun.presets import PRESETS
from strategies.base import Precision
from tests.ranks import RankPool
from tests.speedrun.runs import in_folder, metrics, read, small, train_here
from tests.strategies.small import STRATEGIES
from tests.strategies.test_equivalence import train

STREAM: dict[str, Any] = dict(
    layers=4,
    bigram_rows=83,
    trigram_rows=101,
    fourgram_rows=97,
    ngram_width=10,
    smear=True,
    value_embeddings=(0, 2),
    embedding_skip=True,
    unet_skips=True,
    backout=2,
)
OTHERS: dict[str, Any] = dict(
    layers=4,
    bigram_rows=83,
    value_embeddings=(1,),
    block_skip=(0, 3),
    tied_head=True,
    untie_at=0.5,
    softcap=23.0,
    softcap_form="sigmoid",
)
FADING = ScheduleConfig(future_weights=(0.5, 0.25))


@dataclasses.dataclass(frozen=True)
class Features(Case):
    """A case of the equivalence with features of the model."""

    features: tuple[tuple[str, Any], ...] = ()

    def config(self) -> Config:
        config = super().config()
        model = dataclasses.replace(config.model, **dict(self.features))
        schedule = dataclasses.replace(config.schedule, future_weights=FADING.future_weights)
        return dataclasses.replace(config, model=model, schedule=schedule)


PRESET = dataclasses.replace(
    PRESETS["speedrun"][1].model,
    vocab_size=257,
    pad_vocab_to=16,
    heads=4,
    width=48,
    bigram_rows=101,
    window_short=3,
    window_long=7,
)
"""Everything at once, in all eleven layers."""

CASES = [
    Features(record=True, rows=8, steps=4, features=tuple(vars(PRESET).items())),
    Features(accumulation=2, rows=8, steps=4, features=tuple(STREAM.items())),
    Features(optimizer="adamw", tied=True, rows=16, steps=4, features=tuple(OTHERS.items())),
]


@pytest.fixture(scope="module")
def references() -> list[Trace]:
    return [run_reference(case) for case in CASES]


@pytest.mark.ranks
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_equals_the_single_process_run(ranks: RankPool, references: list[Trace], name: str) -> None:
    for case, reference in zip(CASES, references, strict=True):
        verdict = compare(ranks.run(2, train, name, case)[0], reference)
        assert verdict.equal, f"{case}: {verdict}"
        learned = reference.weights["bigrams.table.weight"]
        assert (learned.abs().amax(dim=1) > 0).float().mean() > 0.9  # not just carried along
    assert not torch.equal(reference.weights["embed.head"], reference.weights["embed.weight"])


@pytest.mark.ranks
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_books_of_a_run_have_no_remainder(ranks: RankPool, tmp_path: Path, name: str) -> None:
    runs: list[tuple[dict[str, Any], Precision]] = [(STREAM, "bf16"), (OTHERS, "fp32")]
    for features, precision in runs:
        config = small(
            model=ModelConfig(heads=3, width=48, mlp_width=101, max_sequence_length=64, **features),
            data=DataConfig(sequence_length=32, global_batch=12, micro_batch=3, eval_tokens=320),
            schedule=FADING,
            untimed_steps=1,
        )
        out = tmp_path / precision
        ranks.run(2, train_here, name, in_folder(config, out), precision)
        assert metrics(out / "run")[-1]["val_loss"] < metrics(out / "run")[0]["val_loss"]
        for books in read(out / "run", "ledger.json")["ranks"]:
            books["memory"].pop("peak")  # of activations an estimate
            if name == "ddp":  # its buckets are out of sight before the first backward pass
                books["memory"]["after prepare"].pop("gradients")
            entries = [entry for moment in books["memory"].values() for entry in moment.values()]
            entries += [*books["optimizer states by group"].values(), *books["traffic"]]
            assert "table" in books["optimizer states by group"] and books["traffic"]
            assert [entry for entry in entries if entry["remainder"]] == []
