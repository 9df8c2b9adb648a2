"""Where the backward pass of this GPT may hold most: what is still kept, and what passes. Plain Python without torch.

Letters as in speedrun/books/activations.py. The pass goes from the head through the blocks, the last one first, to the
embeddings. In a block there are three moments:

- in its MLP, which comes first, so that all of the block is there still (with gradient checkpointing it has just been
  computed again): gradients by the stream, r·n·h, and by the hidden units, c·n·m, and by the weight that goes down,
  c·h·m, with its float32 copy under autocast, 4·h·m. Where ReLU is squared, later: by the square too, c·n·m; by the
  MLP's input, c·n·h; and by the weight that goes up, c·h·m;
- at its end, where all of its weights have their gradients;
- after it, at the next block's. What a block keeps goes with it.

Every embedding is a moment too: its gradient is as large as it is, in the dtype that it is looked up in. A tied one
has the head's beside it all the time. These are estimates: see strategies.forecast.predict.predict_peak.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from speedrun.books.log import PredictedActivations
from speedrun.config import ModelConfig
from speedrun.wiring import skip_sources
from strategies.layout import Shape
from strategies.ledger.terms import BackwardMoment, ComputePrecision

LOSS = "logits and loss"


def backward_moments(
    model: ModelConfig,
    tokens: int,
    precision: ComputePrecision,
    shapes: Mapping[str, Shape],
    kept: PredictedActivations,
    whole: PredictedActivations,
    batch: int,
) -> list[BackwardMoment]:
    """In order, after the loss. tokens: of a micro-batch; kept: what the forward pass keeps; whole: what it would keep
    without gradient checkpointing; batch: bytes of tokens and targets.
    """
    stream_size = 2 if precision in ("bf16", "fp16") else 4
    size = 4 if precision == "fp32" else 2
    stream, width, hidden = stream_size * tokens * model.width, model.width, model.mlp_width or 4 * model.width
    names: dict[int, list[str]] = {at: [] for at in range(-1, model.layers + 1)}
    for name in shapes:
        names[_place(name, model.layers)].append(name)
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    tied = (stream_size * numel["embed.weight"]) if model.tied_head else 0
    skips = (stream if model.embedding_skip else 0) + (stream if skip_sources(model) else 0)
    between = batch + stream + tied + skips

    here = [0] * (model.layers + 2)  # bytes kept by place; before the blocks: the last entry
    again = [0] * (model.layers + 2)
    for lines, bytes in ((kept.lines, here), (whole.lines, again)):
        for line in lines:
            if line.part != LOSS:
                bytes[_place(line.module, model.layers)] += line.bytes
    below = here[-1]
    under = [below + sum(here[:layer]) for layer in range(model.layers + 1)]  # kept by what comes after a block

    head = tuple(names[model.layers])
    found = [BackwardMoment(head, head, under[model.layers] + here[model.layers], between)]
    weight, squares = width * hidden, model.mlp == "relu2"
    in_mlp = between + size * (tokens * hidden + weight) + (4 * weight if precision == "autocast" else 0)
    if squares:
        in_mlp = between + size * (tokens * (2 * hidden + width) + weight)
    for layer in reversed(range(model.layers)):
        block = tuple(names[layer])
        down = tuple(name for name in block if squares and ".mlp.down" in name)
        rest = tuple(name for name in block if name not in down)
        found.append(BackwardMoment(down, block, under[layer] + again[layer], in_mlp))
        found.append(BackwardMoment(rest, block, under[layer], between + size * tokens * width))
    for name in reversed(names[-1]):
        found.append(BackwardMoment((), (name,), below, between + stream_size * numel[name]))
        found.append(BackwardMoment((name,), (name,), below, batch))
    return [*found[:-1], replace(found[-1], activations=0)]


def _place(path: str, layers: int) -> int:
    """A module's or a parameter's: its block, or −1 before them, or their number after them."""
    first, _, rest = path.partition(".")
    if first == "blocks":
        return int(rest.partition(".")[0])
    return layers if first in ("norm", "head", "backout") else -1
