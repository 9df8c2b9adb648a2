"""The closed form of the peak against the engines themselves, simulated."""

import dataclasses
from typing import Any

import pytest

from shardrun.certify.equivalence import Case
from speedrun.books.activations import batch_bytes, predict_activations
from speedrun.books.backward import backward_moments
from speedrun.books.shapes import ledger_groups, shapes_from
from speedrun.config import Config
from strategies.forecast.predict import predict_after_forward, predict_peak
from strategies.ledger.terms import Scenario
from tests.strategies.forecast.test_simulate import BATCH, engine, simulated

MODEL: Config = Case(optimizer="muon").config()
WORDY = dataclasses.replace(MODEL, model=dataclasses.replace(MODEL.model, vocab_size=1001))
"""So many words that the peak is in the backward pass of the loss."""


@pytest.mark.parametrize("accumulation", (1, 2))
@pytest.mark.parametrize("name", ("ddp", "fsdp", "fsdp_no_reshard", "zero1", "zero2", "zero3", "zero3_persistent"))
def test_at_the_loss_the_closed_form_is_exact(name: str, accumulation: int) -> None:
    """On the last of 3 ranks in fp32 with CPU kernels, to a few numbers: the loss and its gradient."""
    strategy, rank, world_size = name.partition("_")[0], 2, 3
    settings: dict[str, Any] = {**engine(strategy)}
    if name == "fsdp_no_reshard":
        settings["reshard_after_forward"] = False
    if name == "zero3_persistent":
        settings = engine(strategy, stage3_param_persistence_threshold=2500)
    options: dict[str, Any] = {"precision": "fp32", "accumulation": accumulation, "emulate_gloo": True}
    replay = simulated(strategy, rank, world_size, WORDY, BATCH, engine=settings, steps=3, **options)
    run = Scenario(strategy, shapes_from(WORDY.model), ledger_groups(WORDY), world_size, "fp32", accumulation, settings)
    rows, time = BATCH
    kept = predict_activations(WORDY.model, rows, time, "fp32")
    passing = 2 * 4 * rows * time * WORDY.model.vocab_size + 2 * 8 * rows * time
    peak = predict_peak(run, kept.total, passing)[rank]
    for category in {*peak, *replay.peak}:
        assert abs(peak.get(category, 0) - replay.peak.get(category, 0)) <= 64, (category, peak, replay.peak)


@pytest.mark.parametrize(("accumulation", "overlap"), ((1, False), (2, True)))
def test_at_the_end_zero2_holds_its_bucket_and_the_copy_that_is_sent(accumulation: int, overlap: bool) -> None:
    """With so few tokens that the peak is there; all of it is named, but for a few numbers."""
    rows, time = 1, 16
    settings = engine("zero2", overlap_comm=overlap)
    options: dict[str, Any] = {"precision": "fp32", "accumulation": accumulation, "emulate_gloo": True}
    replay = simulated("zero2", 0, 2, MODEL, (rows, time), engine=settings, **options)
    run = Scenario("zero2", shapes_from(MODEL.model), ledger_groups(MODEL), 2, "fp32", accumulation, settings)
    kept = predict_activations(MODEL.model, rows, time, "fp32")
    batch = batch_bytes(rows, time)
    moments = backward_moments(MODEL.model, rows * time, "fp32", run.shapes, kept, kept, batch)
    peak = predict_peak(run, kept.total, 8 * rows * time * 257, backward=moments)[0]
    assert peak["communication buffers"] == (3 if overlap else 2) * 4 * run.parameters
    for category in {*peak, *replay.peak}:
        assert abs(peak.get(category, 0) - replay.peak.get(category, 0)) <= 512, (category, peak, replay.peak)


def test_ddp_holds_gradients_twice_between_micro_batches() -> None:
    """Under no_sync they are no views of the buckets."""
    shapes, groups = shapes_from(MODEL.model), ledger_groups(dataclasses.replace(MODEL))
    buckets = 4 * sum(
        Scenario("ddp", shapes, groups, 2).numel(n) for g in groups if not g.whole_matrix for n in g.parameters
    )
    one, three = (
        predict_after_forward(Scenario("ddp", shapes, groups, 2, accumulation=n))[0]["gradients"] for n in (1, 3)
    )
    assert one == buckets and three == buckets + 4 * Scenario("ddp", shapes, groups, 2).parameters
