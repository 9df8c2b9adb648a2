"""How many variants FlexAttention and compiled blocks make, and that what would run unfused ends the run."""

import dataclasses
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from speedrun.books.measured import Books
from speedrun.model import flex, gpt
from speedrun.model.compiling import allow_variants, compile_blocks, variants
from strategies.ledger.tracer import Tracer
from tests.model.test_attention_functions import MODEL, counting, model_with, tokens_of
from tests.ranks import RankPool


def test_windows_and_scales_make_no_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage table: stages that change nothing but windows (and, by YaRN, scale and frequencies) compile nothing."""
    model = model_with(monkeypatch, "flex")
    stages = [((40, 100), (2, 160)), ((60, 130), (2, 160)), ((90, 150), (3, 256)), ((150, 0), (3, 256))]
    windows = [(short, long or 200) for (short, long), _ in stages]
    shapes = [shape for _, shape in stages]
    with counting("eager") as counter:
        for i, shape in enumerate(shapes):
            model.set_windows(windows[: i + 1])
            model(tokens_of(*shape), tokens_of(*shape)).sum().backward()
            with torch.no_grad():
                model(tokens_of(2, 256))
        assert counter.frame_count == 2 * (2 + 1) <= variants(MODEL, shapes)


def elsewhere(function: Callable[[pytest.MonkeyPatch], None]) -> None:
    """Run it in a process of its own, on whose end nothing of this one hangs.

    An exception at torch.compile's limit leaves its evaluation of frames switched on, and then arguments live longer:
    whatever else measured allocations in the same process would find more.
    """
    pool = RankPool()
    try:
        pool.run(1, with_monkeypatch, function)
    finally:
        pool.close()


def with_monkeypatch(function: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        function(monkeypatch)


@pytest.mark.ranks
def test_what_would_run_unfused_ends_the_run() -> None:
    elsewhere(runs_unfused)


def runs_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(monkeypatch, "flex", dataclasses.replace(MODEL, paired_head_layers=()))
    with counting("eager"), torch._dynamo.config.patch(recompile_limit=1):
        model(tokens_of())
        with pytest.raises(ValueError, match="uncompiled here.* limit of 1 variants is used up; use --model.attention"):
            model(tokens_of(3))
    with counting("eager"), torch._dynamo.config.patch(disable=True):
        with pytest.raises(ValueError, match="uncompiled here.*torch.compile did not take it"):
            model(tokens_of())
    monkeypatch.setattr(flex, "_without_modes", nullcontext)
    with counting("eager"), Tracer({}), pytest.raises(ValueError, match="uncompiled here.*dispatch mode"):
        model(tokens_of())


@pytest.mark.ranks
def test_compiled_blocks_have_as_few_variants() -> None:
    """--compile: layers of other parts and shapes are variants, windows and scales are not; and FlexAttention inside a
    compiled block survives the counted step, in which torch leaves the block uncompiled.
    """
    elsewhere(runs_compiled)


def runs_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(MODEL, layers=2)
    model = model_with(monkeypatch, "flex", config)
    shapes = [(2, 160), (2, 160), (3, 256)]
    limits = {"recompile_limit": 1, "accumulated_recompile_limit": 1, "fail_on_recompile_limit_hit": False}
    with torch._dynamo.config.patch(limits), counting("eager") as inside:
        counter = CompileCounterWithBackend("eager")
        monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compiled(block, counter))
        compile_blocks(model, cpu=True)
        allow_variants(config, shapes)
        assert torch._dynamo.config.recompile_limit == 2 * variants(config, shapes)
        history = []
        for i, shape in enumerate(shapes):
            history.append((40 + 10 * i, 100 + 10 * i))
            model.set_windows(history)
            loss = model(tokens_of(*shape), tokens_of(*shape))
            loss.backward()
        with torch.no_grad():
            model(tokens_of(2, 256))
        assert counter.frame_count == 2 * (2 + 1) <= variants(config, shapes) and inside.frame_count == 0
        before, shape = counter.frame_count, shapes[-1]
        books = Books.__new__(Books)
        books.device = torch.device("cpu")
        books.strategy = types.SimpleNamespace(model=model, held=dict, offloaded=dict, axes={})  # type: ignore[assignment]
        books.activations = None
        with books.step():
            again = model(tokens_of(*shape), tokens_of(*shape))
            again.backward()
        assert counter.frame_count == before and inside.frame_count == 2
        torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
        torch._dynamo.config.recompile_limit = 1
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            model(tokens_of(1, 200), tokens_of(1, 200))
        attended: list[bool] = []
        monkeypatch.setattr(gpt.Block, "_attend", lambda *args: attended.append(True))
        model(tokens_of(*shape), tokens_of(*shape))
        assert not attended, "blocks are still compiled: their Python does not run"


def compiled(module: torch.nn.Module, backend: Any) -> None:
    """nn.Module.compile with another backend."""
    module._compiled_call_impl = torch.compile(module._call_impl, backend=backend)
