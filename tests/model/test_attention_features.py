"""Windows, paired heads, gates, key offset and YaRN against float64 formulas, one query and one head at a time."""

import cmath
import dataclasses
import functools
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from speedrun.attention_choice import KINDS
from speedrun.config import ModelConfig
from speedrun.model import GPT
from speedrun.model.attend import attend, flash_function
from speedrun.model.attention import Attention
from speedrun.model.masks import Mask, View, document_numbers, layer_masks
from speedrun.model.rope import rope_tables, yarn_scale
from tests.model.attention_on_cpu import VARLEN, flex_on_cpu, varlen_on_cpu

START = 0
PLAIN = ModelConfig(vocab_size=11, layers=3, heads=4, width=32, mlp_width=24, max_sequence_length=32)
ALL = dataclasses.replace(
    PLAIN,
    window_short=2,
    window_long=5,
    long_layers=(1,),
    paired_head_layers=(0,),
    partial_key_offset=True,
    attention_gate=True,
    attention_scale=0.4,
    yarn=True,
)
FEATURES: dict[str, dict[str, Any]] = {
    "windows": dict(window_short=2, window_long=5, long_layers=(1,)),
    "one long window": dict(window_long=3, long_layers=(0, 2)),
    "paired heads": dict(paired_head_layers=(0, 2)),
    "paired heads in a window": dict(paired_head_layers=(0,), window_short=2),
    "gate": dict(attention_gate=True),
    "key offset": dict(partial_key_offset=True, long_layers=(2,)),
    "scale": dict(attention_scale=0.3),
    "all": {f.name: getattr(ALL, f.name) for f in dataclasses.fields(ALL)},
}
HISTORY = [(2, 4), (3, 6), (3, 9)]


def tokens_of(batch: int = 2, time: int = 9) -> Tensor:
    tokens = torch.randint(1, 11, (batch, time), generator=torch.Generator().manual_seed(3))
    tokens[0, [0, 4, 5]] = START
    tokens[1, 6] = START
    return tokens


def random_model(config: ModelConfig, documents: bool = True) -> GPT:
    model = GPT(config, document_start=START if documents else None).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def reference_attention(model: GPT, layer: int, x: Tensor, tokens: Tensor, history: list[tuple[int, int]]) -> Tensor:
    """One row: x [time, width]. Every (query, head, key) triple by itself."""
    config, attention = model.config, model.attentions[layer]
    time, heads, head_dim = len(x), config.heads, config.width // config.heads
    documents = [0] * time
    for t in range(time):
        documents[t] = (documents[t - 1] if t else 0) + int(tokens[t] == START and model.document_start is not None)
    short, long = history[-1]
    window = (long if layer in config.long_layers else short) or time
    scale = config.attention_scale or 1 / math.sqrt(head_dim)
    frequencies = [config.rope_base ** -(p / (head_dim // 4 - 1)) for p in range(head_dim // 4)]
    if config.yarn:
        for (_, old), (_, new) in zip(history[:-1], history[1:], strict=True):
            scale *= 1 + 0.2 * math.log(new / old)
            for p, f in enumerate(frequencies):
                keep = min(1.0, max(0.0, (old * f / 2 / math.pi - 1) / 31))
                frequencies[p] = keep * f + (1 - keep) * f * old / new
    paired = layer in config.paired_head_layers

    @functools.cache
    def head(name: str, t: int, h: int) -> Tensor:
        weight = getattr(attention, name).weight[h * head_dim : (h + 1) * head_dim]
        y = weight @ x[t]
        return y if name == "v" else y / torch.sqrt((y**2).mean() + 1e-6)

    def turned(vector: Tensor, position: int) -> Tensor:
        pairs, parts = head_dim // 4, list(vector)
        for p in range(pairs):
            turn = cmath.exp(1j * position * frequencies[p])
            a, b = vector[p], vector[p + pairs]
            parts[p], parts[p + pairs] = a * turn.real - b * turn.imag, a * turn.imag + b * turn.real
        return torch.stack(parts)

    def position(t: int, h: int) -> int:
        return 2 * t + h % 2 if paired else t

    @functools.cache
    def key(t: int, h: int) -> Tensor:
        y = turned(head("k", t, h), position(t, h))
        if config.partial_key_offset and layer in config.long_layers and t and documents[t] == documents[t - 1]:
            y = torch.cat((y[: head_dim // 2], head("k", t - 1, h)[head_dim // 2 :]))
        return y

    rows = []
    for t in range(time):
        outputs = []
        for h in range(heads):
            q = turned(head("q", t, h), position(t, h))
            sources = [h - h % 2, h - h % 2 + 1] if paired else [h]  # the heads whose keys this one sees
            reach = 2 * window if paired else window
            seen = [
                (s, g)
                for s in range(t + 1)
                for g in sources
                if 0 <= position(t, h) - position(s, g) <= reach and documents[s] == documents[t]
            ]
            weights = torch.softmax(torch.stack([scale * (q @ key(s, g)) for s, g in seen]), 0)
            y = sum(w * head("v", s, g) for w, (s, g) in zip(weights, seen, strict=True))
            if attention.gate is not None:
                y = y / (1 + torch.exp(-(attention.gate.weight[h] @ x[t, :12])))
            outputs.append(y)
        rows.append(attention.out.weight @ torch.cat(outputs))  # type: ignore[arg-type]
    return torch.stack(rows)


@pytest.mark.parametrize("documents", (True, False))
@pytest.mark.parametrize("name", FEATURES)
def test_a_layer_is_its_formula_and_so_are_its_gradients(name: str, documents: bool) -> None:
    config = dataclasses.replace(PLAIN, **FEATURES[name])
    model, tokens = random_model(config, documents), tokens_of()
    history = HISTORY if config.yarn else [(config.window_short, config.window_long)]
    model.set_windows(history)
    masks = model._masks(tokens, torch.float64)
    generator = torch.Generator().manual_seed(1)
    for layer, attention in enumerate(model.attentions):
        x = torch.randn(2, 9, config.width, dtype=torch.float64, generator=generator, requires_grad=True)
        towards = torch.randn(2, 9, config.width, dtype=torch.float64, generator=generator)
        inputs = [x, *attention.parameters()]
        ours = attention(x, masks[layer])
        theirs = torch.stack([reference_attention(model, layer, x[b], tokens[b], history) for b in range(2)])
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        gradients = (torch.autograd.grad((y * towards).sum(), inputs) for y in (ours, theirs))
        for gradient, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", FEATURES)
def test_off_the_weights_and_the_loss_are_those_without_it(name: str) -> None:
    on, off = GPT(dataclasses.replace(PLAIN, **FEATURES[name])), GPT(PLAIN)
    on.init_weights(5)
    off.init_weights(5)
    theirs = dict(on.named_parameters())
    for key, parameter in off.named_parameters():
        assert torch.equal(parameter, theirs[key])
    assert all(key.endswith("gate.weight") for key in set(theirs) - set(dict(off.named_parameters())))


def test_wide_windows_change_nothing_and_gates_start_half_open() -> None:
    tokens = tokens_of()
    off = random_model(PLAIN)
    wide = random_model(dataclasses.replace(PLAIN, window_short=8, window_long=100, long_layers=(1,)))
    assert torch.equal(off(tokens), wide(tokens))
    gated = random_model(dataclasses.replace(PLAIN, attention_gate=True))
    with torch.no_grad():
        for attention, other in zip(gated.attentions, off.attentions, strict=True):
            assert attention.gate is not None
            attention.gate.weight.zero_()
            attention.out.weight.copy_(2 * other.out.weight)
    torch.testing.assert_close(gated(tokens), off(tokens), rtol=1e-12, atol=1e-12)


def test_attention_never_crosses_into_another_document_or_the_future() -> None:
    model, tokens = random_model(ALL), tokens_of()
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    for attention, mask in zip(model.attentions, model._masks(tokens, torch.float64), strict=True):
        y = attention(x, mask)
        (into_six,) = torch.autograd.grad(y[1, 6].sum(), x)  # a document's first token
        assert into_six[1, 6].any() and not into_six[1, :6].any() and not into_six[1, 7:].any()


# Masks: three forms, one rule.


@pytest.mark.parametrize("paired", (False, True))
@pytest.mark.parametrize("documents", (True, False))
@pytest.mark.parametrize("window", (0, 1, 3, 130, 1000))
def test_every_function_and_brute_force_agree(window: int, documents: bool, paired: bool) -> None:
    time = 160  # two blocks of FlexAttention, the second one not full
    generator = torch.Generator().manual_seed(window)
    tokens = torch.randint(0, 40, (2, time), generator=generator)
    view, start = View(window, paired), 0 if documents else None
    positions = 2 * time if paired else time
    q, k, v = (
        torch.randn(2, positions, 3, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)
    )
    token = torch.arange(positions) // (2 if paired else 1)
    document = document_numbers(tokens, 0)[:, token] if documents else torch.zeros(2, positions)
    distance = torch.arange(positions)[:, None] - torch.arange(positions)
    limit = (2 * window if paired else window) or positions
    allowed = (distance >= 0) & (distance <= limit) & (document[:, :, None] == document[:, None])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    towards = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad((expected * towards).sum(), (q, k, v))
    for kind in KINDS[:3] if VARLEN else KINDS[:2]:
        (mask,) = layer_masks(tokens, start, [view], [kind])
        if mask is not None and mask.dense is not None:
            assert torch.equal(mask.dense.expand(2, 1, positions, positions)[:, 0], allowed)
        with flex_on_cpu(), varlen_on_cpu():
            y = attend(q, k, v, mask, 0.3)
            torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
            ours = torch.autograd.grad((y * towards).sum(), (q, k, v))
        torch.testing.assert_close(ours, gradients, rtol=1e-8, atol=1e-9)


def flash_by_brute_force(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """flash_attn_varlen_func's contract: [tokens, heads, head_dim], documents between the numbers of cu_seqlens."""
    assert options["causal"] and options["window_size"][1] == 0 and options["cu_seqlens_q"].dtype == torch.int32
    begins, left = options["cu_seqlens_q"].tolist(), options["window_size"][0]
    pieces = []
    for first, last in zip(begins[:-1], begins[1:], strict=True):
        assert 0 < last - first <= options["max_seqlen_q"]
        a, b, c = (x[first:last].transpose(0, 1) for x in (q, k, v))
        distance = torch.arange(last - first)[:, None] - torch.arange(last - first)
        seen = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        scores = (a @ b.mT * options["softmax_scale"]).masked_fill(~seen, -math.inf)
        pieces.append((scores.softmax(-1) @ c).transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("view", (View(), View(3), View(2, True)))
@pytest.mark.parametrize("documents", (True, False))
def test_flash_gets_the_same_rule_as_lengths(monkeypatch: pytest.MonkeyPatch, view: View, documents: bool) -> None:
    """The package needs a Hopper GPU; here its contract is played by brute force."""
    fake = types.ModuleType("flash_attn_interface")
    fake.flash_attn_varlen_func = flash_by_brute_force  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake)
    flash_function.cache_clear()
    tokens, start = tokens_of(), START if documents else None
    positions = 18 if view.paired else 9
    q, k, v = (torch.randn(2, positions, 2, 8, dtype=torch.float64) for _ in range(3))
    (dense,), (lengths,) = (layer_masks(tokens, start, [view], [kind]) for kind in ("sdpa", "flash"))
    assert lengths is not None and lengths.lengths is not None
    torch.testing.assert_close(attend(q, k, v, lengths, 0.2), attend(q, k, v, dense, 0.2))
    flash_function.cache_clear()


def test_layers_of_one_view_share_a_mask() -> None:
    masks = layer_masks(tokens_of(), START, [View(3), View(5), View(3)], ["sdpa"] * 3)
    assert masks[0] is masks[2] and isinstance(masks[1], Mask)
    assert layer_masks(tokens_of(), None, [View(), View(100)], ["sdpa"] * 2) == [None, None]


# YaRN.


def test_yarn_keeps_fast_frequencies_and_slows_slow_ones() -> None:
    cpu = torch.device("cpu")
    old, new = 384, 896
    before, after = (
        rope_tables(2, 64, 1024.0, cpu, torch.float64, windows)[1][1].asin() for windows in ((old,), (old, new))
    )  # the angle of position 1: the frequency itself, all at most 1
    turns = old * before / (2 * math.pi)
    assert torch.equal(after[turns >= 32], before[turns >= 32]) and (turns >= 32).any()
    torch.testing.assert_close(after[turns <= 1], before[turns <= 1] * old / new)
    assert (turns <= 1).any() and (after <= before).all()
    assert yarn_scale((old, old)) == 1 and yarn_scale((old, new)) == pytest.approx(1 + 0.2 * math.log(new / old))


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (dict(paired_head_layers=(0,), heads=1), ("paired_head_layers", "heads")),
        (dict(long_layers=(3,)), ("long_layers", "layers = 3")),
        (dict(window_long=5), ("window_long", "long_layers")),
        (dict(window_long=5, long_layers=(1, 1)), ("long_layers", "layer 1 twice")),
        (dict(partial_key_offset=True, positions="rope", long_layers=(1,)), ("partial_key_offset", "positions")),
        (dict(partial_key_offset=True), ("partial_key_offset", "long_layers")),
        (
            dict(partial_key_offset=True, long_layers=(1,), paired_head_layers=(1,)),
            ("partial_key_offset", "paired_head_layers"),
        ),
        (dict(attention_gate=True, width=8, heads=1), ("attention_gate", "width")),
        (dict(yarn=True, positions="learned"), ("yarn", "positions")),
        (dict(yarn=True), ("yarn", "window_long")),
    ],
)
def test_conflicts_name_both_fields(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        Attention(dataclasses.replace(PLAIN, **fields))
    assert all(f"model.{names[0]}" in str(error.value) and name in str(error.value) for name in names)
