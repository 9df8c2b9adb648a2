"""The GPT against a second formulation: float64, one position at a time, masks from their definition."""

import cmath
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.config import ModelConfig
from speedrun.model import GPT, Block, parameter_shapes
from speedrun.model.mlp import relu2
from speedrun.presets import PRESETS

START = 0
SMALL = ModelConfig(vocab_size=11, pad_vocab_to=8, layers=2, heads=2, width=16, mlp_width=24, max_sequence_length=16)
MODERN = SMALL
GPT2 = dataclasses.replace(
    SMALL,
    positions="learned",
    mlp="gelu",
    norm="layer",
    qk_norm=False,
    bias=True,
    tied_head=True,
    softcap=0.0,
    zero_init_projections=False,
)
FULL_ROPE = dataclasses.replace(SMALL, positions="rope", softcap=5.0, tied_head=True, qk_norm=False, bias=True)
CONFIGS = {"modern": MODERN, "gpt2": GPT2, "full_rope": FULL_ROPE}


def random_model(config: ModelConfig, document_start: int | None = None, std: float = 0.3) -> GPT:
    """float64, no parameter zero or one."""
    model = GPT(config, document_start=document_start).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, std, generator=generator)
    return model


def random_tokens(config: ModelConfig, batch: int = 2, time: int = 9) -> Tensor:
    tokens = torch.randint(1, config.vocab_size, (batch, time), generator=torch.Generator().manual_seed(3))
    tokens[0, [0, 4, 5]] = START  # a one-token document in the middle; row 1 begins inside a document
    tokens[1, 6] = START
    return tokens


def reference_logits(model: GPT, tokens: Tensor, document_start: int | None) -> Tensor:
    """The formulas, position by position; shares nothing with the model but its parameters."""
    config, weights = model.config, dict(model.named_parameters(remove_duplicate=False))
    head_dim = config.width // config.heads

    def linear(name: str, x: Tensor) -> Tensor:
        y = (weights[f"{name}.weight"] * x).sum(dim=1)
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def rms(x: Tensor) -> Tensor:
        return x / math.sqrt((x**2).mean() + 1e-6)

    def norm(name: str, x: Tensor) -> Tensor:
        if config.norm == "rms":
            return rms(x)
        centred = x - x.mean()
        return centred / math.sqrt((centred**2).mean() + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def nonlinearity(x: Tensor) -> Tensor:
        if config.mlp == "relu2":
            return torch.where(x > 0, x * x, 0)
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def rope(x: Tensor, position: int) -> Tensor:
        pairs = {"rope": head_dim // 2, "half_rope": head_dim // 4, "learned": 0}[config.positions]
        y = x.clone()
        for pair in range(pairs):
            frequency = config.rope_base ** -(pair / (pairs - 1))
            z = complex(x[pair], x[pair + pairs]) * cmath.exp(1j * position * frequency)
            y[pair], y[pair + pairs] = z.real, z.imag
        return y

    def document(row: Tensor, position: int) -> int:
        return sum(int(token) == document_start for token in row[: position + 1])

    rows = []
    for row in tokens:
        stream = []
        for t, token in enumerate(row):
            x = weights["embed.weight"][token]
            if config.positions == "learned":
                x = x + weights["positions.weight"][t]
            stream.append(rms(x) if config.norm == "rms" else x)
        for layer in range(config.layers):
            block = f"blocks.{layer}"
            inputs = [norm(f"{block}.norm1", x) for x in stream]
            q, k, v = ([linear(f"{block}.attention.{m}", x).split(head_dim) for x in inputs] for m in "qkv")
            for i in range(len(row)):
                read = []
                for head in range(config.heads):
                    scores, values = [], []
                    for j in range(i + 1):
                        if document_start is not None and document(row, i) != document(row, j):
                            continue
                        query, key = q[i][head], k[j][head]
                        if config.qk_norm:
                            query, key = rms(query), rms(key)
                        scores.append(math.exp(rope(query, i) @ rope(key, j) / math.sqrt(head_dim)))
                        values.append(v[j][head])
                    total = sum(scores)
                    read.append(sum(score / total * value for score, value in zip(scores, values, strict=True)))
                stream[i] = stream[i] + linear(f"{block}.attention.out", torch.cat(read))
            for i, x in enumerate(stream):
                hidden = nonlinearity(linear(f"{block}.mlp.up", norm(f"{block}.norm2", x)))
                stream[i] = x + linear(f"{block}.mlp.down", hidden)
        logits = torch.stack([linear("head", norm("norm", x))[: config.vocab_size] for x in stream])
        rows.append(config.softcap * torch.tanh(logits / config.softcap) if config.softcap else logits)
    return torch.stack(rows)


@pytest.mark.parametrize("document_start", [None, START])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_logits_equal_the_formulas_position_by_position(config: ModelConfig, document_start: int | None) -> None:
    model = random_model(config, document_start)
    tokens = random_tokens(config)
    logits = model(tokens)
    assert logits.dtype == torch.float64 and logits.shape == (2, 9, 11)
    torch.testing.assert_close(logits, reference_logits(model, tokens, document_start), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_gradients_equal_finite_differences(config: ModelConfig) -> None:
    config = dataclasses.replace(config, vocab_size=5, pad_vocab_to=3, layers=1, width=8, mlp_width=6)
    model = random_model(config, START)
    names, parameters = zip(*model.named_parameters(), strict=True)
    tokens = torch.tensor([[0, 3, 2, 0, 4, 1]])
    targets = torch.tensor([[3, 2, 0, 4, 1, -1]])

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tokens, targets))

    assert torch.autograd.gradcheck(loss, parameters)


def test_loss_sums_or_averages_over_the_targets_that_are_not_minus_one() -> None:
    model = random_model(MODERN, START)
    tokens = random_tokens(MODERN)
    targets = torch.full_like(tokens, -1)
    targets[0, 2], targets[0, 8], targets[1, 5] = 4, 10, 0
    probabilities = model(tokens).softmax(dim=-1)
    nats = -(probabilities[0, 2, 4].log() + probabilities[0, 8, 10].log() + probabilities[1, 5, 0].log())
    torch.testing.assert_close(model(tokens, targets, reduction="sum"), nats)
    torch.testing.assert_close(model(tokens, targets), nats / 3)


def test_padded_vocabulary_gets_neither_probability_nor_gradient() -> None:
    model = random_model(MODERN)
    assert model.head.weight.shape == (16, 16)  # 11 rows padded to a multiple of 8
    tokens, targets = random_tokens(MODERN), random_tokens(MODERN).roll(-1, dims=1)
    with torch.no_grad():
        before = model(tokens, targets)
        model.head.weight[11:] = 100.0
        torch.testing.assert_close(model(tokens, targets), before, rtol=0, atol=0)
    model(tokens, targets).backward()
    assert model.head.weight.grad is not None and model.embed.weight.grad is not None
    assert model.head.weight.grad[:11].abs().min() > 0
    assert not model.head.weight.grad[11:].any() and not model.embed.weight.grad[11:].any()


def test_softcap_bounds_the_logits_and_keeps_small_ones() -> None:
    capped = random_model(dataclasses.replace(MODERN, softcap=2.0), std=1.0)
    plain = random_model(dataclasses.replace(MODERN, softcap=0.0), std=1.0)
    tokens = random_tokens(MODERN)
    with torch.no_grad():
        raw = plain(tokens)
        assert raw.abs().max() > 4
        torch.testing.assert_close(capped(tokens), 2 * (2 / (1 + torch.exp(-raw)) - 1))  # 2·tanh(z/2) = 2·(2σ(z) − 1)


def test_tied_head_is_the_embedding_and_collects_both_gradients() -> None:
    tied = random_model(dataclasses.replace(MODERN, tied_head=True))
    assert tied.head.weight is tied.embed.weight
    assert "head.weight" not in dict(tied.named_parameters())
    untied = random_model(MODERN)
    untied.load_state_dict(tied.state_dict())
    tokens, targets = random_tokens(MODERN), random_tokens(MODERN).roll(-1, dims=1)
    tied(tokens, targets).backward()
    untied(tokens, targets).backward()
    assert untied.embed.weight.grad is not None and untied.head.weight.grad is not None
    torch.testing.assert_close(tied.embed.weight.grad, untied.embed.weight.grad + untied.head.weight.grad)


@pytest.mark.parametrize("document_start", [None, START])
@torch.no_grad()
def test_future_tokens_do_not_influence_the_past(document_start: int | None) -> None:
    model = random_model(MODERN, document_start)
    tokens = random_tokens(MODERN)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(tokens)[:, 5], model(changed)[:, 5])


@torch.no_grad()
def test_a_document_reads_the_same_wherever_it_stands_in_a_row() -> None:
    model = random_model(MODERN, START)
    document = torch.tensor([START, 5, 9, 2, 7])
    alone = model(document[None])[0]
    behind_another = model(torch.cat((torch.tensor([START, 3, 3, 8]), document))[None])[0, 4:]
    torch.testing.assert_close(behind_another, alone, rtol=1e-10, atol=1e-10)


def test_parameters_are_named_and_ordered_as_they_are_used() -> None:
    assert list(parameter_shapes(dataclasses.replace(MODERN, layers=1)).items()) == [
        ("embed.weight", (16, 16)),
        ("blocks.0.attention.q.weight", (16, 16)),
        ("blocks.0.attention.k.weight", (16, 16)),
        ("blocks.0.attention.v.weight", (16, 16)),
        ("blocks.0.attention.out.weight", (16, 16)),
        ("blocks.0.mlp.up.weight", (24, 16)),
        ("blocks.0.mlp.down.weight", (16, 24)),
        ("head.weight", (16, 16)),
    ]
    order = list(dict.fromkeys(name.split(".")[0] for name in parameter_shapes(GPT2)))
    assert order == ["embed", "positions", "blocks", "norm"]
    assert isinstance(GPT(MODERN).blocks[0], Block)


def test_presets_have_the_sizes_they_claim() -> None:
    count = {
        preset: sum(math.prod(shape) for shape in parameter_shapes(config.model).values())
        for preset, (_, config) in PRESETS.items()
    }
    # tiny: 257 tokens × 128, twice (untied head); 2 blocks of 12 width² (4 for attention, 8 for the MLP); three tables
    # of 4000 × 32, each with a projection up to 128 and a scale; smear's strength and its gate of 12
    tables = 3 * (4000 * 32 + 32 * 128 + 1)
    assert count["tiny"] == 2 * 257 * 128 + 2 * 12 * 128**2 + tables + 13 == 855_312
    # gpt2: 50304 rows (50257 padded to 128), 1024 positions; per block 12 width², 9 width of biases, two LayerNorms
    assert count["gpt2"] == (50304 + 1024) * 768 + 12 * (12 * 768**2 + 9 * 768 + 4 * 768) + 2 * 768 == 124_475_904
    assert count["modern"] == 50304 * 768 + 12 * 12 * 768**2 == 123_568_128


def test_zero_initialised_projections_make_every_block_the_identity() -> None:
    model = GPT(MODERN)
    model.init_weights(seed=0)
    x = torch.randn(2, 9, 16)
    for block in model.blocks:
        torch.testing.assert_close(block(x), x, rtol=0, atol=0)
    tokens = random_tokens(MODERN)
    embedded = F.normalize(model.embed(tokens), dim=-1) * 4  # every vector √width long
    logits = 15 * torch.tanh(embedded @ model.head.weight[:11].T / 15)
    torch.testing.assert_close(model(tokens), logits)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"model.heads = 3 does not divide model.width = 16"):
        GPT(dataclasses.replace(MODERN, heads=3))
    with pytest.raises(ValueError, match=r"half_rope .* divisible by 4, but it is 2"):
        GPT(dataclasses.replace(MODERN, heads=8))
    GPT(dataclasses.replace(MODERN, heads=8, positions="rope"))
    with pytest.raises(ValueError, match=r"row of 17 tokens .*max_sequence_length = 16"):
        GPT(MODERN)(torch.zeros(1, 17, dtype=torch.int64))


def test_the_whole_forward_is_one_graph_for_torch_compile() -> None:
    model = random_model(MODERN, START)
    tokens, targets = random_tokens(MODERN), random_tokens(MODERN).roll(-1, dims=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # raises where Python depends on data
    torch.testing.assert_close(compiled(tokens, targets), model(tokens, targets))


def test_relu2_and_its_gradient() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-3, 3.0, *torch.randn(50).tolist()], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(relu2(x), torch.where(x > 0, x * x, 0))
    assert torch.autograd.gradcheck(relu2, x[3:].detach().requires_grad_())
    torch.autograd.backward(relu2(x).sum())
    torch.testing.assert_close(x.grad, torch.where(x > 0, 2 * x, 0).detach())
