"""The shapes of the GPT's parameters, in the model's order, from its configuration alone: plain Python, no torch.

`shardrun plan` needs them where torch is not loaded; a test holds them against the model.
"""

from collections.abc import Mapping
from typing import Any

from speedrun.config import GATE_CHANNELS, Config, ModelConfig, OptimizerConfig
from speedrun.optim.policy import KINDS, kind_of
from speedrun.wiring import ngram_tables, padded_vocabulary, skip_sources
from strategies import catalogue
from strategies.ledger.terms import Group, Modules, Scenario

Shape = tuple[int, ...]


def shapes_from(config: ModelConfig) -> dict[str, Shape]:
    """Name → shape of every parameter of `GPT(config)`; a tied head counts once, as the embedding."""
    width, hidden = config.width, config.mlp_width or 4 * config.width
    rows = padded_vocabulary(config)
    shapes: dict[str, Shape] = {"embed.weight": (rows, width)}
    if config.untie_at:
        shapes["embed.head"] = (rows, width)
    if config.positions == "learned":
        shapes["positions.weight"] = (config.max_sequence_length, width)

    for name, (_, table) in ngram_tables(config).items():
        shapes |= {f"{name}.scale": (1,), f"{name}.table.weight": (table, config.ngram_width or width)}
        if config.ngram_width:
            shapes[f"{name}.up.weight"] = (width, config.ngram_width)
    if config.smear:
        shapes |= {"smear.strength": (1,), "smear.gate.weight": (1, GATE_CHANNELS)}

    def norm(name: str) -> dict[str, Shape]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)} if config.norm == "layer" else {}

    def linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
        return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if config.bias else {})

    skips = skip_sources(config)
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        if layer in skips:
            shapes[f"{block}.skip.{'logit' if config.block_skip else 'strength'}"] = (1,)
        if config.embedding_skip:
            shapes |= {f"{block}.embedding_skip.stream": (1,), f"{block}.embedding_skip.embedding": (1,)}
        shapes |= norm(f"{block}.norm1")
        if layer in config.value_embeddings:
            shapes[f"{block}.value_embedding.table.weight"] = (rows, width)
            shapes[f"{block}.value_embedding.gate.weight"] = (config.heads, GATE_CHANNELS)
        for part in ("q", "k", "v", "out"):
            shapes |= linear(f"{block}.attention.{part}", width, width)
        if config.attention_gate:
            shapes[f"{block}.attention.gate.weight"] = (config.heads, GATE_CHANNELS)
        shapes |= norm(f"{block}.norm2")
        shapes |= linear(f"{block}.mlp.up", width, hidden) | linear(f"{block}.mlp.down", hidden, width)
    if config.backout:
        shapes["backout.strength"] = (1,)
    shapes |= norm("norm")
    if not config.tied_head:
        shapes["head.weight"] = (rows, width)
    return shapes


CLASSES = {
    "attention": "Attention",
    "backout": "Skip",
    "bigrams": "NgramEmbedding",
    "down": "Down",
    "embedding_skip": "EmbeddingSkip",
    "fourgrams": "NgramEmbedding",
    "mlp": "MLP",
    "positions": "Embedding",
    "smear": "Smear",
    "table": "Embedding",
    "trigrams": "NgramEmbedding",
    "value_embedding": "ValueEmbedding",
}
"""The last word of a module's path → its class, where it is always the same."""


def module_classes(config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Path → name of the class of every module with parameters, its own or inside; lists of modules left out.

    shapes: `shapes_from` the same configuration.
    """
    norm = "LayerNorm" if config.norm == "layer" else "RMSNorm"
    depends = {
        "embed": "UntyingEmbedding" if config.untie_at else "Embedding",
        "head": "Head",
        "norm": norm,
        "norm1": norm,
        "norm2": norm,
        "skip": "GatedSkip" if config.block_skip else "Skip",
    }
    classes = {}
    for name in shapes:
        path = name.rpartition(".")[0]
        while path:
            above, _, word = path.rpartition(".")
            if word == "up":
                classes[path] = "Up" if above.endswith("mlp") else "Linear"
            elif word.isdigit():
                classes[path] = "Block"
            elif word != "blocks":
                classes[path] = CLASSES.get(word) or depends.get(word, "Linear")
            path = above
    if config.tied_head and not config.untie_at:
        classes["head"] = "Head"  # it uses the embedding's weight
    return classes


def called_modules(config: ModelConfig, shapes: Mapping[str, Shape]) -> Modules | None:
    """(path, the module's own parameters) of every module but lists, in the order in which a forward pass calls them.

    None where ZeRO-3's order is another one: recomputation calls modules in the backward pass too, an embedding may
    hold the head, and a value embedding is let go late, since no gradient flows into its tokens. shapes: `shapes_from`
    the same configuration.
    """
    if config.checkpointing != "none" or config.untie_at or config.value_embeddings:
        return None
    paths = ["", "embed", *(["positions"] if config.positions == "learned" else [])]
    for name in ngram_tables(config):
        paths += [name, f"{name}.table", *([f"{name}.up"] if config.ngram_width else [])]
    paths += ["smear", "smear.gate"] if config.smear else []
    gate = ["attention.gate"] if config.attention_gate else []
    for layer in range(config.layers):
        parts = ["skip"] if layer in skip_sources(config) else []
        parts += ["embedding_skip"] if config.embedding_skip else []
        parts += ["norm1", "attention", "attention.q", "attention.k", "attention.v", *gate, "attention.out"]
        parts += ["norm2", "mlp", "mlp.up", "mlp.down"]
        paths += [f"blocks.{layer}", *(f"blocks.{layer}.{part}" for part in parts)]
    paths += ["backout"] if config.backout else []
    own: dict[str, tuple[str, ...]] = {path: () for path in (*paths, "norm", "head")}
    for name in shapes:
        own[name.rpartition(".")[0]] += (name,)
    if config.tied_head:
        own["head"] = ("embed.weight",)
    return tuple(own.items())


def ledger_groups(config: Config) -> list[Group]:
    """Which parameters share a rule, as the books want to know it: the policy table without its rules."""
    return _groups(config.optimizer, shapes_from(config.model))


def _groups(options: OptimizerConfig, shapes: Mapping[str, Shape]) -> list[Group]:
    groups = []
    for kind in KINDS:
        names = tuple(name for name, shape in shapes.items() if kind_of(name, shape) == kind)
        if names:
            muon = kind == "block matrix" and options.name == "muon"
            sums = not muon and options.adamw_every > 1
            groups.append(Group(kind, names, muon, muon and options.normuon, sums, not muon and options.sharded_adam))
    return groups


def scenario_of(
    config: Config,
    strategy: str,
    world_size: int,
    precision: str,
    accumulation: int = 1,
    engine: dict[str, Any] | None = None,
) -> Scenario:
    """What predictions need of a run. engine: settings as in an accelerate config; by default the shipped config's."""
    if engine is None:
        engine = catalogue.books(strategy).default_engine(world_size)
    shapes = shapes_from(config.model)
    groups, classes = _groups(config.optimizer, shapes), module_classes(config.model, shapes)
    modules = called_modules(config.model, shapes)
    return Scenario(strategy, shapes, groups, world_size, precision, accumulation, engine, classes, modules=modules)
