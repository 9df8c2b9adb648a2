"""Activations of what is in speedrun/model/attention.py, rope.py and masks.py, for speedrun/books/activations.py.

Letters as there.
"""

from __future__ import annotations

from speedrun.books import stream
from speedrun.books.kernels import View, attention_kind
from speedrun.books.log import Log, Tensor
from speedrun.config import GATE_CHANNELS


def masks(forward: Log) -> dict[View, list[Tensor]]:
    """Keeps nothing: a boolean mask per view, b·s² (4·b·s² for paired heads, and of one row without documents),
    lives as long as the forward pass, or longer by a checkpoint. With it goes a number per token for key offset.

    For flex the block mask, which attention keeps: four tables of int32 with a line per block of 128 queries, and
    the first key of every query, 4·n. For varlen and flash where documents begin: a few numbers, which are left out.
    """
    views: dict[View, list[Tensor]] = {forward.view(layer): [] for layer in range(forward.config.layers)}
    documents = continues = None
    if forward.documents:
        start = forward.new("masks", "starts", forward.tokens, 1)
        documents = forward.new("masks", "document numbers", forward.tokens, 8)
        forward.drop(start)
        if forward.config.partial_key_offset:
            difference = forward.new("masks", "difference to the one before", forward.tokens, 8)
            continues = forward.new("masks", "continues", forward.tokens, 1)
            forward.drop(difference)
    for view, tensors in views.items():
        made: list[Tensor] = []
        kind = attention_kind(view, forward.time, forward.kernels)
        if kind == "flex":
            made = block_mask(forward, *view)
        elif kind == "sdpa":
            made = [tensor for tensor in [mask(forward, *view)] if tensor]
        tensors += [*made, *([continues] if continues else [])]
    if documents:
        forward.drop(documents)
    return views


def block_mask(forward: Log, window: int, paired: bool) -> list[Tensor]:
    """FlexAttention's: per row and block of queries how many blocks of keys it sees and which, and the same for whole
    blocks and for the backward pass; and the first key of every query.
    """
    time = 2 * forward.time if paired else forward.time
    blocks = -(-time // 128)
    tables = forward.new("masks", "block mask", 4 * forward.rows * blocks * (1 + blocks), 4)
    return [tables, forward.new("masks", "first keys", forward.rows * time, 4)]


def mask(forward: Log, window: int, paired: bool) -> Tensor | None:
    """One of them; where there is nothing to mask but the future there is none."""
    if not (forward.documents or window):
        return None
    time = 2 * forward.time if paired else forward.time
    repeated = forward.new("masks", "repeated", forward.rows * time, 8) if forward.documents and paired else None
    ones = forward.new("masks", "ones", time**2, 1)
    near = forward.new("masks", "causal", time**2, 1)
    forward.drop(ones)
    if window:
        causal, near = near, forward.new("masks", "within the window", time**2, 1)
        forward.drop(causal)
    if not forward.documents:
        return near
    same = forward.new("masks", "same document", forward.rows * time**2, 1)
    mask = forward.new("masks", "mask", forward.rows * time**2, 1)
    forward.drop(near, same, *([repeated] if repeated else []))
    return mask


def attention(forward: Log, layer: int, y: Tensor, mask: list[Tensor], values: Tensor | None) -> Tensor:
    """Keeps the input of q, k and v, once (c·n·h) or, cast by each of them under autocast, three times (6·n·h).

    QK-norm keeps 2·(4·n·h + 4·n·a); without it, q and k are kept by attention alone. The rest is `rotate` and
    `scaled_dot_product`; the output projection's input is attention's output.

    Paired heads copy q, k and v, and their output back, n·h·c, which is then kept beside it; two heads lie as they
    should. A gate keeps its sigmoid, c·n·a, and the gated output, c·n·h; under autocast its cast input too, 2·12·n.
    """
    config, name = forward.config, f"blocks.{layer}.attention"
    _, paired = forward.view(layer)
    length = 2 * forward.time if paired else forward.time
    copied = paired and config.heads > 2
    heads = forward.tokens * config.heads
    projections = []
    for matrix in "qkv":
        forward.module = f"{name}.{matrix}"
        projections.append(forward.linear("qkv", y, config.width))
    q, k, v = projections
    forward.module = name
    if values:
        v = stream.add_to_values(forward, v, values)
    if config.qk_norm:
        before = (q, k)
        q, k = normalised(forward, q, heads), normalised(forward, k, heads)
        forward.drop(*before)
    if copied:
        before = (q, k, v)  # type: ignore[assignment]
        q, k, v = (forward.new("attention", "paired", x.elements, forward.product_size) for x in (q, k, v))
        forward.drop(*before)
    tables: list[Tensor] = []
    if config.positions != "learned":
        channels = config.width // config.heads // (2 if config.positions == "half_rope" else 1)
        tables = rope_tables(forward, channels // 2, length)
        before = (q, k)
        q, k = rotate(forward, q, channels // 2), rotate(forward, k, channels // 2)
        forward.drop(*before)
    if config.partial_key_offset and layer in config.long_layers:
        k = offset_keys(forward, k, mask)
    if forward.kernels.cuda:
        own = mask[: len(mask) - (forward.documents and config.partial_key_offset)]
        kind = attention_kind(forward.view(layer), forward.time, forward.kernels)
        output = on_gpu(forward, q, k, v, own, kind, length)
    else:
        output = scaled_dot_product(forward, q, k, v, length, bool(forward.documents or forward.view(layer)[0]))
    if copied:
        joined, output = output, forward.new("attention", "unpaired", output.elements, forward.product_size)
        forward.drop(joined)
    if config.attention_gate:
        output = gate(forward, name, y, output)
    forward.module = f"{name}.out"
    result = forward.linear("attention", output, config.width)
    forward.drop(q, k, v, output, y, *tables, *([values] if values else []))
    return result


def normalised(forward: Log, x: Tensor, vectors: int) -> Tensor:
    """q or k; in the dtype of products, though autocast's RMSNorm may give float32 on a GPU."""
    y = forward.rms_norm("qk norm", x, vectors)
    if y.size > forward.product_size:
        wide, y = y, forward.new("qk norm", "cast", y.elements, forward.product_size)
        forward.drop(wide)
    return y


def offset_keys(forward: Log, k: Tensor, mask: list[Tensor]) -> Tensor:
    """Keeps which token continues a document, n bytes, for the choice between two keys."""
    part, half = "key offset", k.elements // 2
    before = forward.new(part, "still, one back", half, forward.product_size)
    if forward.documents:
        forward.keep("masks", mask[-1])
        shifted, before = before, forward.new(part, "chosen", half, forward.product_size)
        forward.drop(shifted)
    result = forward.new(part, "keys", k.elements, forward.product_size)
    forward.drop(before, k)
    return result


def gate(forward: Log, name: str, y: Tensor, output: Tensor) -> Tensor:
    """Keeps the sigmoid, c·n·a, and the output before it; the gated one is the projection's input."""
    part, heads = "gate", forward.config.heads
    forward.module = f"{name}.gate"
    source = y
    if forward.autocast:
        forward.new("weight casts", "weight", GATE_CHANNELS * heads, 2).kept = True
        if y.size > forward.product_size:
            source = forward.new(part, "cast input", forward.tokens * GATE_CHANNELS, forward.product_size)
    forward.keep(part, source)
    product = forward.new(part, "product", forward.tokens * heads, forward.product_size, product=heads >= GATE_CHANNELS)
    if source is not y:
        forward.drop(source)
    forward.module = name
    gates = forward.new(part, "sigmoid", forward.tokens * heads, forward.product_size)
    forward.drop(product)
    forward.keep(part, gates)
    forward.keep("attention", output)
    result = forward.new(part, "gated", output.elements, forward.product_size)
    forward.drop(gates, output)
    return result


def rope_tables(forward: Log, pairs: int, length: int) -> list[Tensor]:
    """Keeps 2·4·s·pairs: cosine and sine, float32, made anew by every layer (of 2·s positions for paired heads)."""
    part = "rope"
    exponents = forward.new(part, "exponents", pairs, 4)
    positions = forward.new(part, "positions", length, 4)
    negative = forward.new(part, "negative exponents", pairs, 4)
    frequencies = forward.new(part, "frequencies", pairs, 4)
    forward.drop(negative)
    angles = forward.new(part, "angles", length * pairs, 4)
    forward.drop(frequencies)
    tables = [forward.new(part, what, length * pairs, 4) for what in ("cosine", "sine")]
    forward.drop(exponents, positions, angles)
    forward.keep(part, *tables)
    return tables


def rotate(forward: Log, x: Tensor, pairs: int) -> Tensor:
    """Keeps nothing: the tables are no parameters, so no gradient asks for x. Works in float32."""
    part = "rope"
    rotated = forward.tokens * forward.config.heads * pairs
    halves = []
    for what in ("first", "second"):
        products = [forward.new(part, "product", rotated, 4) for _ in range(2)]
        halves.append(forward.new(part, what, rotated, 4))
        forward.drop(*products)
    rest = forward.new(part, "rest in float32", x.elements - 2 * rotated, 4) if x.size < 4 else None
    y = forward.new(part, "rotated", x.elements, 4)
    forward.drop(*halves)
    if rest:
        forward.drop(rest)
        wide, y = y, forward.new(part, "rotated", x.elements, x.size)
        forward.drop(wide)
    return y


def on_gpu(forward: Log, q: Tensor, k: Tensor, v: Tensor, mask: list[Tensor], kind: str, length: int) -> Tensor:
    """Keeps q, k, v and the output, 4·c·n·h, a log-sum-exp per head and query, 4·n·a, and the state of a random
    generator. sdpa also the mask in numbers, c·b·s², flex the block mask. sdpa with a mask, or in fp32, is the
    memory-efficient kernel, which fills up the queries of a row to a multiple of 32.
    """
    part, size = "attention", forward.product_size
    product = kind in ("sdpa", "varlen")  # whose operators selective checkpointing sees
    if kind == "sdpa" and mask:
        (boolean,) = mask
        mask = [forward.new("masks", "mask in numbers", boolean.elements, size)]
    forward.keep("masks", *mask)
    forward.keep(part, q, k, v)
    y = forward.new(part, "output", q.elements, size, product=product)
    queries = forward.tokens * forward.config.heads
    if kind == "sdpa" and (mask or size == 4):
        queries = queries // length * (-(-length // 32) * 32)
    sums = forward.new(part, "log of sums", queries, 4, product=product)
    state = forward.new(part, "generator's state", 2, 8, product=product)
    forward.keep(part, y, sums, state)
    forward.drop(sums, state, *(mask if kind == "sdpa" else []))
    return y


def scaled_dot_product(forward: Log, q: Tensor, k: Tensor, v: Tensor, time: int, masked: bool) -> Tensor:
    """Fused: keeps q, k, v and its output, 4·c·n·h, a sum of exponentials per head and query, 4·n·a, and the mask
    in numbers, c·b·s².

    Composed: keeps float32 copies of q, k and v, 12·n·h, the score matrices after the softmax, 4·a·b·s², and its
    output with the heads side by side, c·n·h. (In fp32 and for one row, v is no copy but the product itself.)
    """
    part, size, config = "attention", forward.product_size, forward.config
    mask = numeric_mask(forward, forward.rows if forward.documents else 1, time, size, masked) if masked else None
    if forward.fused:
        forward.keep("masks", *([mask] if mask else []))
        forward.keep(part, q, k, v)
        y = forward.new(part, "output", q.elements, size, product=True)
        sums = forward.new(part, "log of sums", forward.tokens * config.heads, 4, product=True)
        forward.keep(part, y, sums)
        forward.drop(sums, *([mask] if mask else []))
        return y
    upcast = [forward.new(part, "float32 input", q.elements, 4) for _ in range(3)] if size < 4 else []
    query = forward.new(part, "scaled q", q.elements, 4)
    if not mask:
        mask = numeric_mask(forward, 1, time, 4, masked)
    key = forward.new(part, "scaled k", k.elements, 4)
    copy = forward.rows > 1  # rows and heads become the one batch dimension of bmm, for which several rows are copied
    copies = [forward.new(part, what, q.elements, 4) for what in ("scaled q", "scaled k")] if copy else []
    forward.keep(part, *(copies or (query, key)))
    elements = forward.tokens * config.heads * time
    scores = forward.new(part, "scores", elements, 4)
    forward.drop(key, *copies)
    summed = forward.new(part, "masked scores", elements, 4)
    forward.drop(scores)
    weights = forward.new(part, "attention weights", elements, 4)
    forward.keep(part, weights)
    forward.drop(summed)
    returned = [forward.new(part, "attention weights", elements, size)] if upcast else []
    values = [forward.new(part, "v", v.elements, 4)] if copy else []
    forward.keep(part, *(values or upcast[2:] or (v,)))
    y = forward.new(part, "output", q.elements, 4)
    forward.drop(*values)
    if upcast:
        wide, y = y, forward.new(part, "output", q.elements, size)
        forward.drop(wide)
    forward.drop(weights, query, mask, *upcast, *returned)
    joined = forward.new(part, "output", q.elements, size)
    forward.drop(y)
    return joined


def numeric_mask(forward: Log, rows: int, time: int, size: int, masked: bool) -> Tensor:
    """Zero where a query may look, minus infinity elsewhere; a causal one is made on the spot where none is."""
    boolean = []
    if not masked:
        ones = forward.new("masks", "ones", time**2, 1)
        boolean = [forward.new("masks", "causal", time**2, 1)]
        forward.drop(ones)
    scalars = forward.new("masks", "zero and minus infinity", 2, size)
    mask = forward.new("masks", "mask in numbers", rows * time**2, size)
    forward.drop(scalars, *boolean)
    return mask
