"""The shapes of the GPT's parameters, in the model's order, from its configuration alone: plain Python, no torch.

`shardrun plan` needs them where torch is not loaded; a test holds them against the model.
"""

import math

from speedrun.config import Config, ModelConfig
from speedrun.optim.policy import kind_of
from strategies.ledger.predict import Group

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name → shape of every parameter of `GPT(config)`; a tied head counts once, as the embedding."""
    width, hidden = config.width, config.mlp_width or 4 * config.width
    rows = padded_vocabulary(config)
    shapes: dict[str, Shape] = {"embed.weight": (rows, width)}
    if config.positions == "learned":
        shapes["positions.weight"] = (config.max_sequence_length, width)

    def norm(name: str) -> dict[str, Shape]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)} if config.norm == "layer" else {}

    def linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
        return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if config.bias else {})

    for layer in range(config.layers):
        block = f"blocks.{layer}"
        shapes |= norm(f"{block}.norm1")
        for part in ("q", "k", "v", "out"):
            shapes |= linear(f"{block}.attention.{part}", width, width)
        shapes |= norm(f"{block}.norm2")
        shapes |= linear(f"{block}.mlp.up", width, hidden) | linear(f"{block}.mlp.down", hidden, width)
    shapes |= norm("norm")
    if not config.tied_head:
        shapes["head.weight"] = (rows, width)
    return shapes


def padded_vocabulary(config: ModelConfig) -> int:
    """Rows of the embedding and the head."""
    return math.ceil(config.vocab_size / config.pad_vocab_to) * config.pad_vocab_to


def parameter_groups(config: Config) -> list[Group]:
    """Which parameters share a rule, as the books want to know it: the policy table without its rules."""
    shapes = parameter_shapes(config.model)
    groups = []
    for kind in ("block matrix", "embedding", "head", "vector"):
        names = tuple(name for name, shape in shapes.items() if kind_of(name, shape) == kind)
        if names:
            groups.append(Group(kind, names, kind == "block matrix" and config.optimizer.name == "muon"))
    return groups
