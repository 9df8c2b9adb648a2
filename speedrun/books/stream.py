"""Activations of what is in speedrun/model/embeddings.py, skips.py and loss.py, for speedrun/books/activations.py.

Letters as there; g = 12 channels that a gate reads. Left out are the few integers per token with which an n-gram's hash
is computed: they live for an instant, when nothing else does.
"""

from __future__ import annotations

from speedrun.books.log import Log, Tensor
from speedrun.config import GATE_CHANNELS


def ngrams(forward: Log, name: str, x: Tensor) -> Tensor:
    """Keeps 8·n, the rows of the table; what is looked up, r·n·h, or with a projection its input and output,
    c·n·(width of the table) + c·n·h.
    """
    config, part = forward.config, "n-grams"
    width = config.ngram_width or config.width
    forward.module = name
    rows = forward.new(part, "rows of the table", forward.tokens, 8)
    y = forward.new(part, "looked up", forward.tokens * width, forward.stream_size)
    forward.keep(part, rows)
    forward.drop(rows)
    if config.ngram_width:
        looked_up, y = y, forward.linear(part, y, config.width, bias=False)
        forward.drop(looked_up)
    forward.keep(part, y)
    scaled = forward.new(part, "scaled", x.elements, forward.stream_size)
    forward.drop(y)
    forward.module = ""
    result = forward.new("embedding", "with n-grams", x.elements, forward.stream_size)
    forward.drop(scaled, x)
    return result


def smear(forward: Log, x: Tensor) -> Tensor:
    """Keeps the stream, r·n·h, and for each of n' = b·(s − 1) positions g·c, the gate's input; c, σ; r, the share; and
    where there are documents 1 byte, which of them start one.
    """
    part, positions = "smear", forward.rows * (forward.time - 1)
    size, stream = forward.product_size, forward.stream_size
    forward.module = "smear"
    whole_tokens, forward.tokens = forward.tokens, positions
    channels = Tensor("smear", part, "channels", positions * GATE_CHANNELS, stream)
    copied = forward.rows > 1 or (positions > 1 and forward.config.width > GATE_CHANNELS)  # else they lie together
    if copied:
        channels = forward.new(part, "channels", channels.elements, stream)
    gate = forward.linear(part, channels, 1, bias=False, inputs=GATE_CHANNELS)
    forward.tokens = whole_tokens
    if copied:
        forward.drop(channels)
    opened = forward.new(part, "σ", positions, size)
    forward.drop(gate)
    forward.keep(part, opened)
    share = forward.new(part, "share", positions, stream)
    forward.drop(opened)
    if forward.documents:
        inside = forward.new(part, "no document starts", positions, 1)
        forward.keep(part, inside)
        free, share = share, forward.new(part, "share", positions, stream)
        forward.drop(free, inside)
    forward.keep(part, share, x)
    shared = forward.new(part, "from the position before", positions * forward.config.width, stream)
    summed = forward.new(part, "sum", shared.elements, stream)
    forward.drop(shared)
    result = forward.new(part, "smeared", x.elements, stream)
    forward.drop(summed, share, x)
    return result


def value_embedding(forward: Log, name: str) -> Tensor:
    """Keeps what is looked up, r·n·h; the gate's input, g·c·n; σ and 2σ, 2·c·n·a."""
    config, part = forward.config, "value embedding"
    forward.module = name
    values = forward.new(part, "looked up", forward.tokens * config.width, forward.stream_size)
    channels = forward.new(part, "channels", forward.tokens * GATE_CHANNELS, forward.stream_size)
    gate = forward.linear(part, channels, config.heads, bias=False)
    forward.drop(channels)
    opened = forward.new(part, "σ", gate.elements, gate.size)
    forward.keep(part, opened)
    forward.drop(gate)
    doubled = forward.new(part, "2σ", gate.elements, gate.size)
    forward.drop(opened)
    forward.keep(part, doubled, values)
    result = forward.new(part, "gated", values.elements, forward.stream_size)
    forward.drop(doubled, values)
    return result


def add_to_values(forward: Log, v: Tensor, embedding: Tensor) -> Tensor:
    """Keeps nothing: v with the embedding takes the place of v."""
    part = "value embedding"
    cast = embedding
    if embedding.size != v.size:
        cast = forward.new(part, "cast", embedding.elements, v.size)
    result = forward.new(part, "v with embedding", v.elements, v.size)
    if cast is not embedding:
        forward.drop(cast)
    forward.drop(v)
    return result


def embedding_skip(forward: Log, name: str, x: Tensor, embedded: Tensor) -> Tensor:
    """Keeps the stream before it, r·n·h, whose product with λ's gradient is λ's; and the embedding, once for all."""
    forward.module, part, size = name, "skips", forward.stream_size
    forward.keep(part, x, embedded)
    terms = [forward.new(part, what, x.elements, size) for what in ("λ·x", "μ·x0")]
    result = forward.new(part, "sum", x.elements, size)
    forward.drop(*terms)
    return result


def skip(forward: Log, name: str, x: Tensor, earlier: Tensor, gated: bool) -> Tensor:
    """Keeps the stream at the earlier place, r·n·h, and a gate's one number."""
    forward.module, part, size = name, "skips", forward.stream_size
    strength = [forward.new(part, "σ", 1, size)] if gated else []
    forward.keep(part, *strength, earlier)
    scaled = forward.new(part, "scaled", x.elements, size)
    result = forward.new(part, "sum", x.elements, size)
    forward.drop(scaled, *strength)
    return result


def multi_token_loss(forward: Log, probabilities: Tensor) -> Tensor:
    """Keeps the logarithms of probabilities, 4·n·V, and 9 bytes for each target, of which there are 1 + `future` per
    token: where it stands among them, and whether it is one at all; and the number of next tokens.
    """
    part, targets = "logits and loss", forward.tokens * (1 + forward.future)
    wanted, index = (forward.new(part, what, targets, 8) for what in ("targets", "places of targets"))
    gathered = forward.new(part, "gathered", targets, 4)
    valid = forward.new(part, "is a target", targets, 1)
    forward.keep(part, probabilities, index, valid)
    found = forward.new(part, "found", targets, 4)
    forward.drop(gathered)
    count, result = forward.new(part, "number of targets", 1, 8), forward.new(part, "loss", 1, 4)
    forward.keep(part, count)
    forward.drop(wanted, found)
    return result
