"""Activations of FP8's layers (speedrun/kernels/fp8_linear.py), for speedrun/books/activations.py. Plain Python.

Letters as there; q = 1, bytes of a number in FP8. On a CPU, where FP8 is emulated, this is exact to the byte. Of a GPU
it is what the code says, held against that code on tensors without data: nobody has measured FP8 on one. Left out are
the copies that fill up operands of torch._scaled_mm where a size is no multiple of 16, and the two delayed scales of
each MLP, 16 bytes, which stay for good.
"""

from __future__ import annotations

from speedrun.books.log import Log, Tensor

QUANTIZING = 8
"""Bytes per element inside a quantisation by plain torch: two float32 copies of what is quantised."""


def mlp_up(forward: Log, x: Tensor, outputs: int) -> Tensor:
    """Keeps its input, c·n·h, and where it squares its ReLU its output too, c·n·m: nothing else of the nonlinearity."""
    squares = forward.config.mlp == "relu2"
    y = _linear(forward, "mlp up", x, outputs, squares)
    if squares:
        forward.keep("mlp up", y)
    return y


def mlp_down(forward: Log, x: Tensor, outputs: int) -> Tensor:
    """Keeps its input, c·n·m."""
    return _linear(forward, "mlp down", x, outputs)


def _linear(forward: Log, part: str, x: Tensor, outputs: int, squares: bool = False) -> Tensor:
    """In FP8 forward only, so what backward needs is kept in c. Autocast's copy of the weight is made by the layer, no
    cache keeps it, and a checkpoint makes it anew. While the layer runs there are both operands in FP8, q·(n + m)·h.
    """
    inputs = x.elements // forward.tokens
    source = x
    if x.size > forward.product_size:
        source = forward.new(part, "cast input", x.elements, forward.product_size)
    quantised = _quantise(forward, part, "input", x.elements) + _quantise(forward, part, "weight", inputs * outputs)
    casts = [forward.new("weight casts", "weight", inputs * outputs, 2)] if forward.autocast else []
    forward.keep("weight casts", *casts)
    forward.keep(part, source)
    elements = forward.tokens * outputs
    y = forward.new(part, "product", elements, forward.product_size, product=outputs >= inputs)
    if forward.kernels.cuda and squares:
        forward.pass_through(part, "before it is squared", 2 * elements * forward.product_size)
    forward.drop(*quantised, *casts)
    if source is not x:
        forward.drop(source)
    return y


def head(forward: Log, x: Tensor, outputs: int) -> Tensor:
    """Backward is in FP8 as well: keeps the transposes of input and weight, q·n·h + q·V'·h, and two scales. Not the
    input itself, and under autocast no copy of the weight. While it runs there are their untransposed forms too.
    """
    part, inputs = "head", x.elements // forward.tokens
    source = x
    if x.size > forward.product_size:
        source = forward.new(part, "cast input", x.elements, forward.product_size)
    passing = []
    for what, elements in (("input", x.elements), ("weight", inputs * outputs)):
        q, scale = _quantise(forward, part, what, elements)
        transposed = forward.new(part, f"{what} in FP8, transposed", elements, 1)
        forward.keep(part, transposed, scale)
        passing += [q, transposed, scale]
    y = forward.new("logits and loss", "product", forward.tokens * outputs, forward.product_size)
    forward.drop(*passing)
    if source is not x:
        forward.drop(source)
    return y


def _quantise(forward: Log, part: str, what: str, elements: int) -> list[Tensor]:
    """What is quantised, and its scale."""
    if forward.kernels.cuda:
        forward.pass_through(part, f"{what} on its way to FP8", QUANTIZING * elements)
    return [forward.new(part, f"{what} in FP8", elements, 1), forward.new(part, f"scale of {what}", 1, 4)]


def fused_loss_inside(tokens: int, vocabulary: int, width: int, size: int, block: int) -> list[tuple[str, int]]:
    """What the fused loss holds inside with FP8, where it holds most: (what, bytes).

    Input and weight in FP8 and transposed, all along. Of a block of tokens its logits, and most when their gradient,
    which has taken their place, is quantised: then the one of the block before is still there, q·2·block·V', and that
    block's share of the weight's gradient. size: bytes of an element of a product; block: tokens of a block.
    """
    lasting = [("input in FP8", 2 * tokens * width), ("weight in FP8", 2 * vocabulary * width)]
    first, second = min(block, tokens) * vocabulary, max(0, min(block, tokens - block)) * vocabulary
    share = ("block's gradient by the weight", 4 * vocabulary * width)
    before = [("block's gradient in FP8", 2 * first), share]
    moments = [
        [lasting[0], ("weight on its way to FP8", QUANTIZING * vocabulary * width)],
        [*lasting, ("block of logits", size * first), ("gradient on its way to FP8", QUANTIZING * first)],
        [*lasting, ("block of logits", size * first), *before],
    ]
    if second:
        logits = ("block of logits", size * second)
        moments += [
            [*lasting, logits, *before, ("gradient on its way to FP8", QUANTIZING * second)],
            [*lasting, logits, *before, ("block of logits", size * first)],
            [*lasting, logits, ("block's gradient in FP8", 2 * second), share, share],
        ]
    return max(moments, key=lambda held: sum(bytes for _, bytes in held))
