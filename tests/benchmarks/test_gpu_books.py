"""The committed comparison with a GPU: what it claims, and that it is of today's code."""

import json
from typing import Any

import pytest

from benchmarks import gpu_books
from speedrun.books.measured import against_allocator, entry
from speedrun.books.shapes import scenario_of
from strategies.forecast.predict import predict_after_forward

RESULTS: dict[str, Any] = json.loads(gpu_books.RESULTS.read_text())
WITHIN = 0.02


@pytest.mark.parametrize("strategy", gpu_books.STRATEGIES)
def test_plan_is_within_two_percent_of_the_gpu_while_activations_are_there(strategy: str) -> None:
    """And between the passes within three, where it knows nothing of the blocks that AdamW's moments lie in."""
    predicted, found = gpu_books.closed_form(strategy), gpu_books.measured(strategy)
    for moment in gpu_books.MOMENTS[1:]:
        within = WITHIN if moment in ("after forward", "peak") else 0.03
        assert predicted[moment] == pytest.approx(found[moment], rel=within), moment


def test_a_simulated_row_is_within_two_percent_at_every_moment() -> None:
    pytest.importorskip("deepspeed")
    pytest.importorskip("triton")
    assert gpu_books.replayed("zero2") == pytest.approx(gpu_books.measured("zero2"), rel=WITHIN)


def test_so_are_all_committed_rows() -> None:
    assert tuple(RESULTS["h100"]) == gpu_books.STRATEGIES
    for strategy, figures in RESULTS["h100"].items():
        assert figures["simulated"] == pytest.approx(gpu_books.measured(strategy), rel=WITHIN)
        assert figures["plan"] == gpu_books.closed_form(strategy)  # those of today's code
    assert gpu_books.TABLE.read_text() == gpu_books.render(RESULTS)


def test_the_flagship_by_torch_s_version() -> None:
    peaks = {}
    for torch in gpu_books.VERSIONS:
        stage = gpu_books.planned("speedrun", 16, "flex", torch)
        peaks[torch] = stage.forward_pass.allocated(scenario_of(stage.config, "single", 1, "bf16"))["peak"] / 2**30
    assert peaks["2.11"] == pytest.approx(gpu_books.MEASURED["speedrun"]["peak GiB"], rel=WITHIN)
    # q and k of 11 layers before their norm, 16 × 1024 × 768 elements each, two bytes more
    assert peaks["2.12"] - peaks["2.11"] == pytest.approx(2 * 11 * 16 * 1024 * 768 * 2 / 2**30, rel=1e-6)


def test_a_run_s_ledger_sets_its_predictions_against_the_allocator() -> None:
    """As a run on that H100 would have: the remainder of a moment is what plan is off there."""
    stage = gpu_books.planned("gpt2", 8, "sdpa", "2.11")
    run, forward = scenario_of(stage.config, "fsdp", 1, "bf16"), stage.forward_pass
    held = {
        "after forward": {**predict_after_forward(run)[0], "activations": forward.predict(run).total},
        "peak": forward.predict_peak(run)[0],
    }
    memory = {moment: {name: entry(bytes, bytes) for name, bytes in lines.items()} for moment, lines in held.items()}
    found = gpu_books.measured("fsdp")
    overhead = {
        "after forward": {**forward.overhead(run, peak=False), "batch": forward.batch},
        "peak": forward.overhead(run),
    }
    lines = against_allocator(memory, {moment: {"allocated": found[moment]} for moment in held}, overhead)
    for moment, line in lines.items():
        assert line["predicted"] == forward.allocated(run)[moment] == found[moment] - line["remainder"]
        assert line["predicted, in no category"]["cuBLAS workspaces"] == 67_108_864
