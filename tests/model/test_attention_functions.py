"""Attention functions as a run uses them: which is chosen, what it is handed, and FlexAttention only ever compiled.

Nothing here has run on a GPU. FlexAttention goes through torch.compile and variable-length attention through torch's
own operator, both on CPU tensors (tests/model/attention_on_cpu.py says what is stood in for), or on fake CUDA tensors.
"""

import dataclasses
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

import speedrun.model.attention as attention_module
from speedrun.attention_choice import MEASURED, Kind, Where, choose_attention
from speedrun.books.parts import part_of
from speedrun.config import ModelConfig
from speedrun.model import GPT, gpt, masks
from speedrun.model.attend import activate_flash, attend, flash_function, where
from speedrun.model.masks import View, block_mask, document_numbers, first_seen, layer_masks
from speedrun.presets import PRESETS
from speedrun.run.checks import attention_of_stages
from speedrun.stages import resolve_stages
from strategies.forecast.fake import GPUKernels, _convert_module
from strategies.ledger.activations import measure_activations
from strategies.ledger.tracer import Tracer
from tests.model import attention_on_cpu
from tests.model.attention_on_cpu import flex_on_cpu, needs_varlen, varlen_on_cpu

CPU, H100 = Where("cpu", (0, 0), (2, 13), False), Where("cuda", (9, 0), (2, 11), True)
START = 7
MODEL = ModelConfig(
    vocab_size=64,
    layers=3,
    heads=2,
    width=32,
    mlp_width=32,
    max_sequence_length=512,
    window_short=40,
    window_long=100,
    long_layers=(1,),
    paired_head_layers=(0,),
    attention_scale=0.2,
    yarn=True,
    zero_init_projections=False,
    kernels="torch",
)


def tokens_of(rows: int = 2, time: int = 160) -> Tensor:
    tokens = torch.randint(0, 64, (rows, time), generator=torch.Generator().manual_seed(rows + time))
    tokens[:, 0] = START
    return tokens


def model_with(monkeypatch: pytest.MonkeyPatch, kind: Kind, config: ModelConfig = MODEL) -> GPT:
    """A model that takes this function as if on a GPU."""
    monkeypatch.setattr(gpt, "choose_attention", lambda *args: (kind, "as on a GPU"))
    model = GPT(config, document_start=START)
    model.init_weights(1)
    return model


@contextmanager
def counting(backend: str = "aot_eager") -> Iterator[CompileCounterWithBackend]:
    """FlexAttention on CPU tensors, and how often it has been compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    with flex_on_cpu(counter):
        yield counter
    torch._dynamo.reset()


# The choice.


def test_auto_takes_the_fastest_of_the_nearest_measured_row() -> None:
    for row in MEASURED:
        fastest = min(row.milliseconds, key=lambda kind: row.milliseconds[kind])
        kind, why = choose_attention("auto", H100, row.window, row.length)
        assert kind == fastest and str(row.window) in why and f"{row.milliseconds[fastest]:.2f}" in why
    chosen = {window: choose_attention("auto", H100, window, 1024)[0] for window in (1, 313, 315, 1000, 0)}
    assert chosen == {1: "varlen", 313: "varlen", 315: "flex", 1000: "flex", 0: "flex"}
    assert choose_attention("auto", H100, 1000, 200)[0] == "varlen", "a query sees no more than its row"


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        (dict(torch=(2, 10)), "sdpa", "no varlen: it has windows from torch 2.11 on, and this is 2.10"),
        (dict(capability=(7, 5)), "sdpa", "no varlen: it needs compute capability 8.0, and this GPU has 7.5"),
        (dict(sixteen_bit=False), "sdpa", "no varlen: it takes queries of 16 bits"),
        (dict(flash=True), "varlen", "varlen 0.74"),
    ],
)
def test_auto_says_what_it_passed_over(changed: dict[str, Any], kind: str, words: str) -> None:
    chosen, why = choose_attention("auto", dataclasses.replace(H100, **changed), 128, 1024)
    assert chosen == kind and words in why


def test_on_a_cpu_there_is_sdpa_only() -> None:
    assert choose_attention("auto", CPU, 128, 1024)[0] == choose_attention("sdpa", CPU, 0, 64)[0] == "sdpa"
    for asked in ("flex", "varlen", "flash"):
        with pytest.raises(ValueError, match=rf"model.attention = {asked} cannot run: it needs a CUDA GPU, and this"):
            choose_attention(asked, CPU, 128, 1024)


def test_what_is_asked_for_is_taken_or_refused_with_the_reason() -> None:
    for asked in ("sdpa", "flex", "varlen"):
        assert choose_attention(asked, H100, 128, 1024) == (asked, "model.attention asks for it")
    for asked, changed, words in (
        ("flex", dict(capability=(6, 1)), "capability 7.0"),
        ("flash", dict(), "flash_attn_varlen_func cannot be imported"),
        ("flash", dict(flash=True, capability=(8, 0)), "Hopper"),
        ("dense", dict(), "none of auto"),
    ):
        with pytest.raises(ValueError, match=words):
            choose_attention(asked, dataclasses.replace(H100, **changed), 128, 1024)
    assert choose_attention("flash", dataclasses.replace(H100, flash=True), 128, 1024)[0] == "flash"


def test_every_preset_leaves_the_choice_to_auto() -> None:
    assert {config.model.attention for _, config in PRESETS.values()} == {"auto"}


def test_an_empty_package_of_the_name_is_no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    empty = types.ModuleType("flash_attn_interface")
    for function in (None, attend):
        if function is not None:
            empty.flash_attn_varlen_func = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flash_attn_interface", empty)
        flash_function.cache_clear()
        assert where(torch.device("cuda"), torch.bfloat16).flash == (function is not None)
    flash_function.cache_clear()


@needs_varlen
def test_a_newer_flash_attention_is_switched_on_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    tried: list[str] = []

    def switch(name: str) -> None:
        tried.append(name)
        if name not in there:
            raise RuntimeError("Module 'flash_attn_interface' does not expose FA3 kernels")

    assert activate_flash((9, 0)) == "FlashAttention-2", "torch's own switch finds neither package here"
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", switch)
    assert activate_flash((8, 0)) == "FlashAttention-2" and not tried
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")  # whose FlashAttention-4 has no windows
    assert activate_flash((9, 0)) == "FlashAttention-2" and tried == ["FA3"]
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert activate_flash((9, 0)) == "FlashAttention-2" and tried == ["FA3", "FA3", "FA4"]
    there |= {"FA3", "FA4"}
    assert activate_flash((9, 0)) == "FlashAttention-3" and activate_flash((10, 0)) == "FlashAttention-4"


def test_a_run_says_for_every_stage_what_computes_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS["speedrun"][1]
    tiny = dataclasses.replace(config.model, vocab_size=64, pad_vocab_to=1, width=96, bigram_rows=64)
    model, stages = GPT(tiny, document_start=START), resolve_stages(config, 100)
    kinds, lines = attention_of_stages(model, stages, torch.device("cpu"), "bf16")
    first = lines[0]
    assert (
        kinds == {"sdpa"} and len(lines) == 4 and "schedule.stages.0, window 256 and 128 and 384: sdpa (on cpu" in first
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    kinds, lines = attention_of_stages(model, stages, torch.device("cuda"), "bf16")
    assert lines[0].startswith(
        "attention in schedule.stages.0, window 256 and 128: varlen (the nearest measured window, 128"
    )
    assert lines[1].startswith("attention in schedule.stages.0, window 384: flex (the nearest measured window, 768")
    assert [line.split(": ")[1].split()[0] for line in lines[2:]] == ["flex"] * 3
    assert kinds == {"varlen", "flex"}


# What each function is handed.


@pytest.mark.parametrize("window", (0, 1, 40, 128, 200))
@pytest.mark.parametrize("time", (64, 256, 300))
def test_block_masks_are_those_of_torch(time: int, window: int) -> None:
    """`create_block_mask` looks at every pair."""
    tokens = torch.randint(0, 90, (3, time), generator=torch.Generator().manual_seed(time))
    for documents in (None, document_numbers(tokens, START)):
        first = first_seen(documents, 3, time, window, tokens.device)
        ours = block_mask(first)
        theirs = create_block_mask(ours.mask_mod, 3, None, time, time, device="cpu")
        expected = masks.dense_mask(documents, time, window, tokens.device).expand(3, 1, time, time)
        positions = torch.arange(time)
        assert torch.equal((positions >= first[:, None, :, None]) & (positions <= positions[:, None]), expected)
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
            lists, numbers = (getattr(m, name.replace("num_blocks", "indices")) for m in (ours, theirs))
            listed = torch.arange(lists.shape[-1]) < getattr(ours, name)[..., None]
            assert torch.equal(lists[listed], numbers[listed]), name
        assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE


@pytest.mark.parametrize("weights", (torch.float32, torch.bfloat16))
def test_every_function_gets_one_dtype(monkeypatch: pytest.MonkeyPatch, weights: torch.dtype) -> None:
    """By CUDA's rules of autocast, under which RMSNorm gives float32 (single, DDP), and with bf16 weights (FSDP, ZeRO).

    Tensors are fake, of the CPU; `GPUKernels` has the rules.
    """
    seen: set[tuple[torch.dtype, ...]] = set()

    def watched(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        seen.add((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v, *rest)

    monkeypatch.setattr(attention_module, "attend", watched)
    config = dataclasses.replace(MODEL, partial_key_offset=True, value_embeddings=(1,))
    with FakeTensorMode(), GPUKernels((2, 12)):  # from this version on RMSNorm is on autocast's list
        model = _convert_module(GPT(config, document_start=START), lambda weight: weight.to(weights))
        tokens = torch.zeros(2, 160, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
            model(tokens, tokens)
        assert seen == {(torch.bfloat16,) * 3}
        seen.clear()
        GPT(config, document_start=START)(tokens, tokens)
        assert seen == {(torch.float32,) * 3}


def test_documents_are_counted_once_in_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting them waits for the device."""
    calls: list[int] = []
    monkeypatch.setattr(torch, "nonzero", counted(torch.nonzero, calls))
    views = [View(3), View(5), View(2, True), View()]
    made = layer_masks(tokens_of(), START, views, ["varlen", "flash", "varlen", "sdpa"])
    assert len(calls) == 1
    plain, _, paired, _ = (mask.lengths if mask else None for mask in made)
    assert plain is not None and paired is not None and torch.equal(paired, 2 * plain) and paired.dtype == torch.int32


@pytest.mark.parametrize("kind", ("flex", pytest.param("varlen", marks=needs_varlen)))
def test_the_whole_model_has_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    tokens, results = tokens_of(), []
    for function in ("sdpa", kind):
        model = model_with(monkeypatch, function)
        model.set_windows([(40, 100), (60, 130)])
        with counting(), varlen_on_cpu():
            loss = model(tokens[:, :-1], tokens[:, 1:])
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@needs_varlen
def test_selective_checkpointing_keeps_what_variable_length_attention_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with(monkeypatch, "varlen", dataclasses.replace(MODEL, checkpointing="selective"))
    attended: list[int] = []
    monkeypatch.setattr(attention_on_cpu, "_scores", counted(attention_on_cpu._scores, attended))
    with varlen_on_cpu():
        loss = model(tokens_of(), tokens_of())
        assert len(attended) == MODEL.layers
        loss.backward()
    assert len(attended) == 2 * MODEL.layers, "each backward pass computes scores, and no forward pass does again"


def counted(function: Any, calls: list[int]) -> Any:
    return lambda *args: (calls.append(1), function(*args))[1]


# FlexAttention is compiled, or the run ends.


@pytest.mark.parametrize("checkpointing", ("none", "block", "selective"))
def test_the_counted_step_runs_and_books_compiled_attention(
    monkeypatch: pytest.MonkeyPatch, checkpointing: Any
) -> None:
    """The step of a run under the tracer and the recorder: the same numbers, no further variant, and what compiled code
    keeps (q, k, v, output, log-sum-exp) and allocates is in the log. It was NotImplementedError from torch.
    """
    model = model_with(monkeypatch, "flex", dataclasses.replace(MODEL, checkpointing=checkpointing, layers=2))
    tokens = tokens_of()
    tracer = Tracer({id(module): name for name, module in model.named_modules()})
    with counting() as counter:
        expected = model(tokens, tokens)
        expected.backward()
        gradients = [p.grad for p in model.parameters()]
        model.zero_grad()
        before = counter.frame_count
        with tracer:
            tracer.enter(0, "forward")
            losses: list[Tensor] = []
            book = measure_activations(model, lambda: (losses.append(model(tokens, tokens)), losses[0])[1], part_of)
            tracer.enter(0, "backward")
            losses[0].backward()
        assert counter.frame_count == before == 2, "one for the layer of paired heads, one for the other"
    torch.testing.assert_close(losses[0], expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
    made = [e.bytes for e in tracer.events if e.kind == "alloc" and e.tag.endswith("compiled code")]
    whole, sums = 2 * 160 * 32 * 4, 2 * 160 * 2 * 4  # q's bytes, and a float32 per query and head
    forward, backward = [whole, sums], [whole] * 3
    again = {"none": [], "block": forward, "selective": forward}[checkpointing]
    assert made == forward * 2 + (again + backward) * 2
    kept = [row for row in book.rows if row.kernel == "compiled code"]
    assert [row.bytes for row in kept] == ([whole, sums] * 2 if checkpointing == "none" else [])
    assert all(row.part == "attention" and row.operator == "flex" for row in kept)


def test_on_fake_tensors_it_leaves_what_the_kernel_would() -> None:
    """A simulation compiles nothing: the operators' shapes, and what is kept, are those of the compiled function."""
    tokens, kept = tokens_of(), []
    for fake in (False, True):
        with counting(), FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
            (mask,) = layer_masks(tokens.clone(), START, [View(40)], ["flex"])
            assert mask is not None
            q, k, v = (torch.zeros(2, 160, 2, 16, requires_grad=True) for _ in range(3))
            saved: list[tuple[torch.Size, torch.dtype]] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: (saved.append((t.shape, t.dtype)), t)[1],  # type: ignore[misc]
                lambda t: t,
            ):
                y = attend(q, k, v, mask, None)
            y.sum().backward()
            assert y.shape == q.shape == q.grad.shape  # type: ignore[union-attr]
        kept.append(sorted(saved, key=str))
    assert kept[0] == kept[1]
