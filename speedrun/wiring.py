"""How a model's blocks are joined, and which of its settings contradict one another. Plain Python, no torch."""

import math

from speedrun.config import GATE_CHANNELS, ModelConfig
from speedrun.ranges import check_ranges
from strategies.errors import UserError


def padded_vocabulary(config: ModelConfig) -> int:
    """Rows of the embedding and the head."""
    return math.ceil(config.vocab_size / config.pad_vocab_to) * config.pad_vocab_to


def ngram_tables(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name of every table of n-gram embeddings → the length of its n-grams and its rows."""
    rows = {"bigrams": config.bigram_rows, "trigrams": config.trigram_rows, "fourgrams": config.fourgram_rows}
    return {name: (length, rows[name]) for length, name in enumerate(rows, start=2) if rows[name]}


def skip_sources(config: ModelConfig) -> dict[int, int]:
    """Block → the earlier block whose output it takes in.

    In the U-net the last block reads the first one's, the last but one the second's, and so on inwards; two blocks in
    the middle that follow one another are not joined, for there the skip would be the stream itself.
    """
    if config.block_skip:
        source, target = config.block_skip
        return {target: source}
    if config.unet_skips:
        last = config.layers - 1
        return {last - i: i for i in range(config.layers // 2) if last - i > i + 1}
    return {}


def check_model(config: ModelConfig) -> None:
    """Raises ValueError where a field is out of its range, or two cannot both be as they are."""
    check_ranges(config, "model.")
    check_attention(config)
    layers = config.layers
    if config.unet_skips and config.block_skip:
        raise UserError(
            f"model.unet_skips and model.block_skip = {config.block_skip} both lead earlier blocks into later ones: "
            "choose one of them"
        )
    if config.unet_skips and layers < 3:
        raise UserError(f"model.unet_skips joins blocks that have one between them: model.layers = {layers} is too few")
    if config.block_skip and not 0 <= config.block_skip[0] < config.block_skip[1] - 1 < layers - 1:
        raise UserError(
            f"model.block_skip = {config.block_skip} must name a block and a later one, not the next, of the "
            f"model.layers = {layers} blocks (0 is the first)"
        )
    if config.backout >= layers:
        raise UserError(
            f"model.backout = {config.backout} must be a number of blocks below model.layers = {layers}, or 0 for none"
        )
    wrong = [layer for layer in config.value_embeddings if layer >= layers]
    if wrong or len(set(config.value_embeddings)) < len(config.value_embeddings):
        raise UserError(
            f"model.value_embeddings = {config.value_embeddings} must name blocks once each, of the model.layers = "
            f"{layers} blocks (0 is the first)"
        )
    if config.ngram_width and not ngram_tables(config):
        raise UserError(
            f"model.ngram_width = {config.ngram_width} is the width of tables that model.bigram_rows, trigram_rows and "
            "fourgram_rows = 0 leave out"
        )
    if config.fp8 and config.bias:
        raise UserError("model.fp8 is on and so is model.bias: FP8 layers have no biases; switch one of them off")
    if config.untie_at and not config.tied_head:
        raise UserError(f"model.untie_at = {config.untie_at} unties a head that model.tied_head = False never tied")
    if config.softcap_form == "sigmoid" and not config.softcap:
        raise UserError("model.softcap_form = sigmoid needs a model.softcap above 0, such as 23")
    for feature, on in (("smear", config.smear), ("value_embeddings", bool(config.value_embeddings))):
        if on and config.width < GATE_CHANNELS:
            raise UserError(
                f"model.{feature} has gates that read {GATE_CHANNELS} channels, but model.width = {config.width}"
            )


def check_fp8(config: ModelConfig, precision: str, capability: tuple[int, int] | None = None) -> None:
    """Raises ValueError where FP8 is asked for and cannot be. precision: of the run; capability: of its GPU, if any."""
    if config.fp8 and precision == "fp16":
        raise UserError(
            "model.fp8 is on and mixed_precision is fp16: FP8's scales of gradients know nothing of fp16's loss scale, "
            "and every GPU that multiplies in FP8 has bf16; write mixed_precision: bf16, or switch model.fp8 off."
        )
    if config.fp8 and capability and capability < (8, 9):
        raise UserError(
            f"model.fp8 is on, but this GPU has compute capability {capability[0]}.{capability[1]}, and GPUs multiply "
            "in FP8 from 8.9 on: switch model.fp8 off."
        )


def check_attention(config: ModelConfig) -> None:
    """Raise ValueError where options of attention conflict or name what is not there."""
    if config.width % config.heads:
        raise UserError(
            f"model.heads = {config.heads} does not divide model.width = {config.width}: every head needs the same "
            "whole number of channels"
        )
    multiple = {"rope": 2, "half_rope": 4, "learned": 1}[config.positions]
    if config.width // config.heads % multiple:
        raise UserError(
            f"model.positions = {config.positions} rotates channels in pairs and needs a head dimension (width / "
            f"heads) divisible by {multiple}, but it is {config.width // config.heads}: change model.width or "
            "model.heads"
        )
    for name in ("long_layers", "paired_head_layers"):
        named: tuple[int, ...] = getattr(config, name)
        for layer in named:
            if not 0 <= layer < config.layers:
                raise UserError(f"model.{name} names layer {layer}, but model.layers = {config.layers} has none such")
            if named.count(layer) > 1:
                raise UserError(f"model.{name} names layer {layer} twice: name each layer once")
    if config.window_long and not config.long_layers:
        raise UserError(f"model.window_long = {config.window_long} has no layer: name some in model.long_layers")
    if config.paired_head_layers and config.heads % 2:
        raise UserError(f"model.paired_head_layers needs an even number of heads, and model.heads = {config.heads}")
    if config.partial_key_offset:
        if config.positions != "half_rope":
            raise UserError(
                "model.partial_key_offset shifts the channels that carry no position, which only model.positions = "
                f"half_rope has, not {config.positions}"
            )
        if not config.long_layers:
            raise UserError("model.partial_key_offset acts on model.long_layers, which names none")
        if both := set(config.long_layers) & set(config.paired_head_layers):
            raise UserError(
                f"model.partial_key_offset acts on model.long_layers, and layer {min(both)} of them is in "
                "model.paired_head_layers too, where the position before is the same token: take it out of one"
            )
    if config.attention_gate and config.width < GATE_CHANNELS:
        raise UserError(
            f"model.attention_gate reads {GATE_CHANNELS} channels, and model.width = {config.width} has fewer"
        )
    if config.yarn and config.positions == "learned":
        raise UserError("model.yarn changes RoPE's frequencies, and model.positions = learned has none")
    if config.yarn and not config.window_long:
        raise UserError("model.yarn follows the long window, and model.window_long = 0 is none")
