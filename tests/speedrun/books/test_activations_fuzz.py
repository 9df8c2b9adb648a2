"""Activations of models that nobody has thought of: any fields together, few rows, odd sizes. Predicted is measured."""

import random
from functools import partial

import pytest
import torch

from speedrun.books.activations import predict_activations
from speedrun.books.kernels import kernels_on_gpu
from speedrun.books.parts import part_of
from speedrun.config import GATE_CHANNELS, ModelConfig
from strategies.ledger.activations import measure_activations
from tests.model.attention_on_cpu import VARLEN
from tests.speedrun.books.test_activations import KINDS, PRECISIONS, assert_agree, make
from tests.speedrun.books.test_activations_gpu import A_FEW_NUMBERS, HOPPER, simulated


def drawn(generator: random.Random) -> ModelConfig:
    """Any model that can be built."""
    choice = generator.choice
    layers, heads = choice((1, 2, 3, 4)), choice((1, 2, 3, 4, 6))

    def some_layers() -> tuple[int, ...]:
        return tuple(sorted(generator.sample(range(layers), generator.randint(0, layers)))) if choice((0, 1)) else ()

    switches = ("qk_norm", "bias", "fp8", "tied_head", "smear", "embedding_skip", "unet_skips", "attention_gate")
    on = {name: choice((False, True)) for name in (*switches, "yarn", "partial_key_offset")}
    on["bias"] &= not on["fp8"]
    on["unet_skips"] &= layers > 2
    width, positions, long_layers = (
        heads * choice((4, 8, 12, 16)),
        choice(("rope", "half_rope", "learned")),
        some_layers(),
    )
    gated = width >= GATE_CHANNELS
    on["smear"] &= gated
    on["attention_gate"] &= gated
    window_long = choice((0, 20)) if long_layers else 0
    on["yarn"] &= window_long > 0 and positions != "learned"
    paired = some_layers() if heads % 2 == 0 else ()
    on["partial_key_offset"] &= positions == "half_rope" and bool(long_layers) and not set(long_layers) & set(paired)
    softcap, bigram_rows = choice((0.0, 15.0)), choice((0, 83))
    return ModelConfig(
        vocab_size=choice((257, 300)),
        pad_vocab_to=choice((1, 16)),
        layers=layers,
        heads=heads,
        width=width,
        mlp_width=choice((0, 7, 16, 101)),
        max_sequence_length=130,
        positions=positions,
        mlp=choice(("relu2", "gelu")),
        norm=choice(("rms", "layer")),
        untie_at=choice((0.0, 0.5)) if on["tied_head"] else 0.0,
        softcap=softcap,
        softcap_form=choice(("tanh", "sigmoid")) if softcap else "tanh",
        bigram_rows=bigram_rows,
        trigram_rows=choice((0, 97)),
        ngram_width=choice((0, 10)) if bigram_rows else 0,
        value_embeddings=some_layers() if gated else (),
        block_skip=choice((None, (0, layers - 1))) if layers > 2 and not on["unet_skips"] else None,
        backout=choice((0, layers - 1)),
        window_short=choice((0, 3, 100)),
        window_long=window_long,
        long_layers=long_layers,
        paired_head_layers=paired,
        checkpointing=choice(KINDS),
        **on,
    )


@pytest.mark.parametrize("seed", range(2))
def test_on_a_cpu(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(15):
        config, precision = drawn(generator), generator.choice(PRECISIONS)
        rows, time, documents = generator.choice((1, 2, 3)), generator.choice((2, 16, 33)), generator.random() < 0.8
        weights = (0.5, 0.25, 0.1)[: generator.choice((0, 0, 1, 3))]
        model, tokens = make(config, precision, documents), torch.randint(1, config.vocab_size, (rows, time))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            forward = partial(model, tokens, tokens, future_weights=weights, tied=bool(config.untie_at))
            book = measure_activations(model, forward, part_of)
        about = dict(documents=documents, future=len(weights))
        assert_agree(book, predict_activations(config, rows, time, precision, **about))  # type: ignore[arg-type]


def test_on_a_gpu_as_far_as_tensors_without_data_tell() -> None:
    generator = random.Random(1)
    for _ in range(10):
        config, precision = drawn(generator), generator.choice(PRECISIONS)
        attention = ("sdpa", "flex", *(("varlen",) if VARLEN and precision != "fp32" else ()))
        config = ModelConfig(**{**vars(config), "attention": generator.choice(attention)})
        kernels = kernels_on_gpu(HOPPER, (2, 13), config, "fp32" if precision == "fp32" else "bf16")
        rows, time = generator.choice((1, 2, 3)), generator.choice((2, 64, 130))
        predicted = predict_activations(config, rows, time, precision, documents=True, kernels=kernels)
        assert abs(simulated(config, precision, kernels, rows, time) - predicted.total) <= A_FEW_NUMBERS, config
