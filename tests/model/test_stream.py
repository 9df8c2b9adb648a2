"""What enters and joins the stream, against formulas written out position by position."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from speedrun.config import ModelConfig
from speedrun.model import GPT
from speedrun.model.embeddings import hashed_rows
from speedrun.model.masks import Mask
from tests.model.test_gpt import SMALL, random_model, random_tokens

START = 0
TABLES: dict[str, Any] = dict(bigram_rows=17, trigram_rows=13, fourgram_rows=11)
STREAM = dataclasses.replace(
    SMALL,
    layers=5,
    **TABLES,
    ngram_width=6,
    smear=True,
    value_embeddings=(0, 4),
    embedding_skip=True,
    unet_skips=True,
    backout=3,
)
OTHERS = dataclasses.replace(SMALL, layers=4, **TABLES, value_embeddings=(1,), block_skip=(0, 2), tied_head=True)
BASELINE = dataclasses.replace(STREAM, norm="layer", positions="learned", bias=True, mlp="gelu")
CONFIGS = {"stream": STREAM, "others": OTHERS, "baseline": BASELINE}
BY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def reference(model: GPT, tokens: Tensor, document_start: int | None) -> Tensor:
    """The stream in Python loops; attention, MLP and norms are the model's own, which test_gpt.py holds to formulas."""
    config, weights = model.config, dict(model.named_parameters())

    def ngram(row: Tensor, t: int, length: int, name: str) -> Tensor:
        table = weights[f"{name}.table.weight"]
        last = [int(token) for token in row[max(0, t - length + 1) : t + 1]]
        index = 0
        if len(last) == length and document_start not in last[1:]:
            mixed = 0
            for token, multiplier in zip(reversed(last), (36313, 27191, 51647, 44129), strict=False):
                mixed ^= token * multiplier
            index = 1 + mixed % (len(table) - 1)
        up = weights.get(f"{name}.up.weight")
        return weights[f"{name}.scale"] * (table[index] if up is None else up @ table[index])

    rows = []
    for row in tokens:
        stream = []
        for t, token in enumerate(row):
            x = weights["embed.weight"][token]
            if config.positions == "learned":
                x = x + weights["positions.weight"][t]
            if config.norm == "rms":
                x = x / ((x**2).mean() + 1e-6).sqrt()
            for length, name in ((2, "bigrams"), (3, "trigrams"), (4, "fourgrams")):
                x = x + ngram(row, t, length, name)
            stream.append(x)
        if config.smear:
            gate, strength = weights["smear.gate.weight"][0], weights["smear.strength"]
            stream = [
                x + strength * sigmoid(gate @ x[:12]) * stream[t - 1] if t and row[t] != document_start else x
                for t, x in enumerate(stream)
            ]
        rows.append(torch.stack(stream))
    x = embedded = torch.stack(rows)

    mask = None
    if document_start is not None:
        number = (tokens == document_start).cumsum(1)
        mask = (
            torch.tensor(
                [[[[int(i >= j and r[i] == r[j]) for j in range(len(r))] for i in range(len(r))]] for r in number]
            )
            > 0
        )
    after = []
    for i, block in enumerate(model.blocks):
        if config.unet_skips and i > config.layers / 2:
            x = x + weights[f"blocks.{i}.skip.strength"] * after[config.layers - 1 - i]
        if config.block_skip and i == config.block_skip[1]:
            x = x + sigmoid(weights[f"blocks.{i}.skip.logit"]) * after[config.block_skip[0]]
        if config.embedding_skip:
            x = weights[f"blocks.{i}.embedding_skip.stream"] * x
            x = x + weights[f"blocks.{i}.embedding_skip.embedding"] * embedded
        y = block.norm1(x)
        values = None
        if i in config.value_embeddings:
            found = weights[f"blocks.{i}.value_embedding.table.weight"][tokens]
            gate = weights[f"blocks.{i}.value_embedding.gate.weight"]
            head_dim = config.width // config.heads
            values = torch.stack(
                [
                    2
                    * sigmoid(y[..., :6] @ gate[h, :6] + found[..., :6] @ gate[h, 6:])[..., None]
                    * found[..., h * head_dim : (h + 1) * head_dim]
                    for h in range(config.heads)
                ],
                dim=2,
            )
        x = x + block.attention(y, None if mask is None else Mask(dense=mask), values)
        x = x + block.mlp(block.norm2(x))
        after.append(x)
    if config.backout:
        x = x + weights["backout.strength"] * after[config.backout - 1]
    logits = model.head(model.norm(x))[..., : config.vocab_size]
    return config.softcap * torch.tanh(logits / config.softcap)


@pytest.mark.parametrize("document_start", [None, START])
@BY_CONFIG
def test_logits_and_gradients_equal_the_formulas(config: ModelConfig, document_start: int | None) -> None:
    model = random_model(config, document_start)
    tokens = random_tokens(config)
    expected, logits = reference(model, tokens, document_start), model(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad((z * direction).sum(), parameters) for z in (logits, expected))
    for name, gradient, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-8, msg=name)
        assert gradient.any(), name


@BY_CONFIG
def test_gradients_equal_finite_differences(config: ModelConfig) -> None:
    config = dataclasses.replace(config, vocab_size=5, pad_vocab_to=1, width=16, mlp_width=4, bigram_rows=7)
    model = random_model(config, START)
    names, parameters = zip(*model.named_parameters(), strict=True)
    tokens, targets = torch.tensor([[0, 3, 2, 0, 4, 1]]), torch.tensor([[3, 2, 0, 4, 1, -1]])

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tokens, targets))

    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)


@BY_CONFIG
@torch.no_grad()
def test_nothing_crosses_a_document_or_the_start_of_a_row(config: ModelConfig) -> None:
    if config.positions == "learned":
        return  # these count from the start of the row
    model = random_model(config, START)
    document = torch.tensor([START, 5, 9, 2, 7])
    alone = model(document[None])[0]
    behind_another = model(torch.cat((torch.tensor([START, 3, 3, 8]), document))[None])[0, 4:]
    torch.testing.assert_close(behind_another, alone, rtol=1e-10, atol=1e-10)
    other = torch.tensor([[4, 4, 6, 1, 1], [START, 5, 9, 2, 7]])
    torch.testing.assert_close(model(other)[1], alone, rtol=1e-10, atol=1e-10)  # nor a row of the batch


@pytest.mark.parametrize("document_start", [None, START])
@BY_CONFIG
@torch.no_grad()
def test_future_tokens_do_not_influence_the_past(config: ModelConfig, document_start: int | None) -> None:
    model = random_model(config, document_start)
    tokens = random_tokens(config)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5], rtol=1e-12, atol=1e-12)


def test_the_hash_spreads_bigrams_over_the_whole_table() -> None:
    """All 257² pairs of bytes: every row but the first is used, none by far more than its share."""
    pairs = torch.cartesian_prod(torch.arange(257), torch.arange(257))
    rows = hashed_rows(pairs, 2, 4096, None)
    assert (rows[:, 0] == 0).all()
    counts = torch.bincount(rows[:, 1], minlength=4096)
    assert counts[0] == 0 and counts[1:].min() > 0 and counts.max() < 6 * 257**2 / 4095


@BY_CONFIG
def test_features_start_without_random_numbers_and_most_without_effect(config: ModelConfig) -> None:
    """The other parameters start as in a model without any; so do logits, but for skips that start above zero."""
    plain = dataclasses.replace(
        ModelConfig(), **{f.name: getattr(config, f.name) for f in dataclasses.fields(SMALL) if f.name not in FEATURES}
    )
    models = {"on": GPT(config), "off": GPT(plain)}
    quiet = {"unet_skips": False, "block_skip": None, "backout": 0}
    models["quiet"] = GPT(dataclasses.replace(config, **quiet))
    for model in models.values():
        model.init_weights(3)
    on, off = (dict(models[key].named_parameters()) for key in ("on", "off"))
    assert len(on) > len(off)
    for name, parameter in off.items():
        assert torch.equal(parameter, on[name]), name
    tokens = random_tokens(config)
    assert torch.equal(models["quiet"](tokens), models["off"](tokens))


FEATURES = {
    *("bigram_rows", "trigram_rows", "fourgram_rows", "ngram_width", "smear", "value_embeddings"),
    *("embedding_skip", "unet_skips", "block_skip", "backout"),
}


@pytest.mark.parametrize("kind", ["block", "selective"])
@BY_CONFIG
def test_checkpointing_changes_no_bit(config: ModelConfig, kind: Any) -> None:
    gradients = []
    for checkpointing in ("none", kind):
        model = random_model(dataclasses.replace(config, checkpointing=checkpointing), START)
        tokens = random_tokens(config)
        model(tokens, tokens.roll(-1, dims=1)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_forward_is_one_graph_for_torch_compile() -> None:
    model = random_model(STREAM, START)
    tokens = random_tokens(STREAM)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(unet_skips=True, block_skip=(0, 2)), r"model.unet_skips and model.block_skip = \(0, 2\)"),
        (dict(unet_skips=True, layers=2), r"model.unet_skips .* model.layers = 2"),
        (dict(block_skip=(1, 2)), r"model.block_skip = \(1, 2\) .* model.layers = 4"),
        (dict(block_skip=(0, 4)), r"model.block_skip = \(0, 4\)"),
        (dict(backout=4), r"model.backout = 4 .* model.layers = 4"),
        (dict(value_embeddings=(0, 4)), r"model.value_embeddings = \(0, 4\) .* model.layers = 4"),
        (dict(value_embeddings=(1, 1)), r"model.value_embeddings = \(1, 1\)"),
        (dict(bigram_rows=1), r"model.bigram_rows is 1,"),
        (dict(ngram_width=4), r"model.ngram_width = 4 .* model.bigram_rows, trigram_rows"),
        (dict(smear=True, width=8), r"model.smear .* model.width = 8"),
    ],
)
def test_conflicts_name_both_fields(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GPT(dataclasses.replace(SMALL, **{"layers": 4, **changes}))
