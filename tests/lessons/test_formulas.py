"""The formulas that lessons 9, 10, 11 and 14 teach, against the books and the trainer, which compute them otherwise."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from lessons import kit
from speedrun.books.korthikanti import korthikanti
from speedrun.config import ScheduleConfig
from speedrun.data.shards import open_shard, write_tokens
from speedrun.model.masks import document_mask
from speedrun.optim.schedule import learning_rate_multiplier
from strategies.forecast.predict import predict_memory
from strategies.forecast.traffic import predict_traffic
from strategies.ledger.terms import MODEL_STATES

LESSONS = Path(__file__).parent.parent.parent / "lessons"


def load(lesson: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, LESSONS / lesson / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def side_by_side() -> ModuleType:
    return load("09_side_by_side", "demo")


def test_what_strategies_hold(side_by_side: ModuleType) -> None:
    """Within the parameters that a boundary of ZeRO's slices cuts, padding and step counts."""
    solution = load("09_side_by_side", "solution")
    psi = side_by_side.books(side_by_side.SEVEN, "ddp", 8, "bf16").parameters
    for name, gigabytes in solution.states_gb(psi, 8).items():
        held = predict_memory(side_by_side.books(side_by_side.SEVEN, name, 8, "bf16"))[0]["after backward"]
        booked = sum(held[category] for category in MODEL_STATES) / 1e9
        assert gigabytes == pytest.approx(booked, rel=0.02), name


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_strategies_send(side_by_side: ModuleType, accumulation: int) -> None:
    """Within what FSDP and ZeRO-3 do not gather twice: embeddings, the block at the turn."""
    solution = load("09_side_by_side", "solution")
    psi = side_by_side.books(side_by_side.SEVEN, "ddp", 8, "bf16").parameters
    for name, sent in solution.wire_bytes(psi, 8, accumulation).items():
        entries = predict_traffic(side_by_side.books(side_by_side.SEVEN, name, 8, "bf16", accumulation))
        booked = sum(entry.ring_bytes for entry in entries if entry.purpose != "bookkeeping")
        assert sent == pytest.approx(booked, rel=0.06 if name == "zero3" else 0.02), name


def test_the_quiz_knows_mistakes_by_their_value(side_by_side: ModuleType) -> None:
    psi, right = 7 * 10**9, 26.25
    known = side_by_side.mistakes("zero1", psi)
    for guessed, words in (
        (26.0, "right"),
        (38.5, "the paper's"),
        (14.2, "stage 3"),
        (22.7, "master"),
        (60.0, "times"),
    ):
        assert words in side_by_side.remark(guessed, right, known)


def test_activations_of_a_layer() -> None:
    solution = load("10_activations", "solution")
    for rows, length, width, heads in ((1, 2048, 4096, 32), (8, 1024, 768, 12)):
        for fused in (False, True):
            found = solution.layer_bytes(rows, length, width, heads, fused)
            assert found == korthikanti(length, rows, width, heads, 1, flash=fused)
        inputs = korthikanti(length, rows, width, heads, 12, recomputation="full")
        one = korthikanti(length, rows, width, heads, 1, flash=True) - inputs / 12
        assert solution.checkpointed_bytes(12, rows, length, width) == inputs + one


def test_reading_a_shard(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 50_257, 4000)
    write_tokens(tmp_path / "shard.bin", tokens)
    found = load("11_data", "solution").read_tokens(tmp_path / "shard.bin", 100, 2100)
    assert np.array_equal(found, open_shard(tmp_path / "shard.bin")[100:2100])


def test_document_masks() -> None:
    tokens = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(0))
    found = load("11_data", "solution").document_mask(tokens, 2)
    assert torch.equal(found, document_mask(tokens[None], 2)[0, 0])


@pytest.mark.parametrize(("steps", "warmup", "share"), [(10, 0, 0.4), (23, 4, 0.5), (50, 5, 0.62)])
def test_schedules(steps: int, warmup: int, share: float) -> None:
    solution = load("14_schedules", "solution")
    down = ScheduleConfig(name="trapezoid", warmup=warmup, decay=share)
    wave = ScheduleConfig(name="cosine", warmup=warmup, final=share)
    for step in range(steps):
        assert solution.trapezoid(step, steps, warmup, share) == pytest.approx(
            learning_rate_multiplier(down, step, steps)
        )
        assert solution.cosine(step, steps, warmup, share) == pytest.approx(learning_rate_multiplier(wave, step, steps))


def test_mean_multipliers() -> None:
    """The areas, by adding up a long run's factors."""
    steps, warmup, decay = 20_000, 0.1, 0.4
    for name, mean in load("14_schedules", "solution").mean_multiplier(warmup, decay).items():
        schedule = ScheduleConfig(name=name, warmup=round(warmup * steps), decay=decay)
        total = sum(learning_rate_multiplier(schedule, step, steps) for step in range(steps))
        assert mean == pytest.approx(total / steps, abs=1e-3), name


def test_a_lesson_s_batch_is_cut_exactly_or_not_at_all() -> None:
    """16 rows, every one once, in so many equal micro-batches: no number of processes trains on some rows twice."""
    data = kit.open_text()
    for ranks, accumulation in ((1, 1), (2, 2), (4, 2), (8, 2)):
        cut = kit.cut(data, ranks, accumulation)
        pieces = [piece for rank in range(ranks) for piece in cut.micro_batches(rank)]
        assert cut.accumulation == accumulation and [row for piece in pieces for row in range(*piece)] == list(
            range(16)
        )
    for ranks, accumulation in ((3, 1), (5, 2), (16, 2)):
        with pytest.raises(ValueError, match="not divide"):
            kit.cut(data, ranks, accumulation)
