"""Validation: the plain mean over all targets, whatever the ranks and the rows of a forward pass."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from speedrun.config import Config, DataConfig, ModelConfig
from speedrun.data import open_data
from speedrun.data.shards import write_tokens
from speedrun.evaluate import Validation, evaluate
from speedrun.model import GPT
from speedrun.optim.policy import parameter_groups
from tests.ranks import RankPool
from tests.speedrun.runs import small
from tests.strategies.test_equivalence import make

ROWS = 7


def plain(config: Config) -> tuple[float, float]:
    """Mean nats per target and nats per byte of text from logits, in float64, without `evaluate`."""
    data = open_data(config.data, config.model.vocab_size, config.seed)
    model = GPT(config.model, document_start=data.document_start)
    model.init_weights(config.seed)
    nats, targets, text_bytes = 0.0, 0, 0
    for row in range(data.validation_rows):
        inputs, wanted = data.validation(row, row + 1)
        with torch.no_grad():
            nats += float(model(inputs, wanted, "sum").double())
        targets += wanted.numel()
        text_bytes += int((wanted < 256).sum())
    return nats / targets, nats / text_bytes


def validate(name: str, config: Config, rows: int) -> Validation:
    """On a rank."""
    data = open_data(config.data, config.model.vocab_size, config.seed)
    model = GPT(config.model, document_start=data.document_start)
    model.init_weights(config.seed)
    recipe = parameter_groups({name: tuple(p.shape) for name, p in model.named_parameters()}, config.optimizer)
    strategy = make(name)
    strategy.prepare(model, recipe, clip=1.0, accumulation=1)
    return evaluate(strategy, data, rows)


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "world_size"), [("single", 1), ("ddp", 2), ("fsdp", 3), ("zero2", 3), ("zero3", 2)])
def test_validation_is_the_plain_mean_for_any_number_of_ranks(ranks: RankPool, name: str, world_size: int) -> None:
    """7 rows divide neither by the ranks nor by the rows of a pass; with 3 ranks of 4 rows one gets none at all."""
    config = small(data=DataConfig(sequence_length=16, eval_sequence_length=32, global_batch=12, eval_tokens=32 * ROWS))
    loss, nats_per_byte = plain(config)
    for rows in (1, 2, 4):
        for result in ranks.run(world_size, validate, name, config, rows):
            assert result.loss == pytest.approx(loss, rel=1e-6)
            assert result.bits_per_byte == pytest.approx(nats_per_byte / math.log(2), rel=1e-6)


@pytest.mark.ranks
def test_no_bits_per_byte_where_the_tokenizer_is_unknown(ranks: RankPool, tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 500, 2000)
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        write_tokens(tmp_path / name, tokens)
    config = small(
        model=ModelConfig(vocab_size=50257, layers=1, heads=1, width=16, max_sequence_length=64, tied_head=True),
        data=DataConfig(source=str(tmp_path), sequence_length=32, global_batch=12, eval_tokens=96),
    )
    for result in ranks.run(2, validate, "ddp", config, 2):
        assert result.bits_per_byte is None
        assert result.loss == pytest.approx(plain(config)[0], rel=1e-6)
