"""Activations, predicted: what the forward pass of this GPT leaves for backward, and its peak, from shapes alone.

Pure arithmetic without torch: milliseconds for a model of any size. The functions below follow the model line by line
and note every tensor's size and lifetime; each says in closed form what its part *keeps* for backward, in bytes:

    s, b, n    tokens of a row, rows, n = s·b tokens in all
    h, a, m    width, heads, MLP width;   V words, and V' with the padding
    r, c       bytes of an element of the residual stream and of a matrix product:
               4 and 4 in fp32, 4 and 2 under bf16 autocast, 2 and 2 in pure bf16

Per block, with fused attention, these add up to (small terms: statistics per token or per head, RoPE's tables)

                     none               selective          block
    gpt2             64, 40, 32 s·b·h   40, 22, 20 s·b·h   4, 4, 2 s·b·h      (fp32, autocast, pure bf16)
    speedrun         72, 48, 44 s·b·h   40, 22, 20 s·b·h   4, 4, 2 s·b·h

Selective checkpointing keeps what matrix products and attention give (see `speedrun.model.gpt.keep_products`).

The textbook's 16-bit block (`korthikanti`) is 34·s·b·h + 5·a·s²·b. Ours differs where it really is another model:

- No dropout, so no masks of dropout: gpt2 in pure bf16 is 34 − 2 = 32. Fused attention keeps no score matrices.
- Autocast: the stream, and so each norm's input, is float32 (+2 twice); q, k and v each cast the norm's output anew and
  keep their own copy (+4); and a bf16 copy of every weight stays until the autocast context ends.
- RMSNorm as composed on a CPU works on a float32 copy of bf16 inputs and keeps that, which QK-norm pays for twice more:
  4 bytes each for q and k before it, beside the rotated ones after it (+8), and +2 for each of a block's two norms.
- A document mask is turned from booleans to numbers in every layer: c·b·s² each.

Beside the blocks, the loss keeps 4·n·V, 8·n·V with the softcap, and needs one or two such tensors more at the peak:
most of the memory of a small model.

The kernels are those that torch picks on a CPU (with 2.13 it agrees to the byte), unless a GPU's are asked for
(`Kernels`). There

- RMSNorm is one kernel that keeps its input in whatever dtype it has: 2 bytes in pure bf16, and for q and k under
  autocast, which from torch 2.12 on casts them to float32 before. LayerNorm's statistics are float32.
- The fused loss of speedrun/kernels has no logits: it keeps the gradients by its input and by the head's weight,
  2·n·h + 4·V'·h. Inside, at the peak, it holds two blocks of 4096 tokens' logits, 2·2·4096·V'.
- The linear layer that squares its ReLU keeps only what it gives. Without it autocast squares in float32.
- Every attention function keeps q, k, v, its output and a log-sum-exp per head and query; sdpa the document mask in
  numbers too, the others none.

This was exact to the byte for gpt2 on an H100 (benchmarks/gpu_books.md).

FP8 (speedrun/books/fp8.py) changes the head and the MLP: a block keeps c·n·m less where ReLU is squared, under autocast
no weights that a checkpoint could cast again, and the head FP8's transposes. Emulated on a CPU it is exact to the byte;
on a GPU nobody has measured it.
"""

from typing import Literal

from speedrun.books import attention, fp8, stream
from speedrun.books.kernels import CPU, Kernels
from speedrun.books.log import Log, PredictedActivations, Tensor
from speedrun.config import ModelConfig
from speedrun.wiring import ngram_tables, padded_vocabulary, skip_sources
from strategies.errors import UserError
from strategies.ledger.terms import ComputePrecision

LOSS_ROWS = 4096
"""Tokens of a block of the fused loss: ROWS of speedrun/kernels/cross_entropy.py, which needs Triton."""


def predict_activations(
    config: ModelConfig,
    rows: int,
    sequence_length: int,
    precision: ComputePrecision,
    *,
    documents: bool = False,
    attention: Literal["fused", "math"] = "fused",
    future: int = 0,
    kernels: Kernels = CPU,
) -> PredictedActivations:
    """Activations of one forward pass with loss over rows × sequence_length tokens on one rank.

    documents: attention stops at document starts (`GPT(..., document_start=...)`), for which it needs a mask.
    attention: of a CPU, fused (flash and its like: no score matrices) or torch's composed kernel, which keeps them.
    future: how many tokens after the next one are in the loss (`speedrun.model.loss.multi_token_loss`).
    kernels: what computes all this.

    Raises ValueError where rows or sequence_length is not positive.
    """
    if rows < 1 or sequence_length < 1:
        raise UserError(
            f"rows = {rows} and sequence_length = {sequence_length}: a forward pass needs at least one of each"
        )
    forward = _Forward(config, rows, sequence_length, precision, documents, attention, future, kernels)
    forward.run()
    return forward.replay()


def batch_bytes(rows: int, sequence_length: int) -> int:
    """Tokens and targets in int64."""
    return rows * sequence_length * 2 * 8


def loss_backward(config: ModelConfig, rows: int, sequence_length: int, kernels: Kernels = CPU) -> int:
    """Bytes that the backward pass of the loss allocates beside what is kept: two gradients of the logits in float32,
    while the batch is there.

    The fused loss has its gradients already, and multiplies them: by that of the weight in float32, then in bf16.
    """
    batch, tokens = batch_bytes(rows, sequence_length), rows * sequence_length
    if kernels.triton:
        return batch + 2 * tokens * config.width + (4 + 2) * padded_vocabulary(config) * config.width
    return batch + 2 * 4 * tokens * config.vocab_size


class _Forward(Log):
    """What each module of the GPT writes into the log."""

    def run(self) -> None:
        """GPT.forward with targets."""
        config = self.config
        x = self.embedding()
        for name in ngram_tables(config):
            x = stream.ngrams(self, name, x)
        if config.smear:
            x = stream.smear(self, x)
        masks = attention.masks(self)
        sources = skip_sources(config)
        embedded = x if config.embedding_skip else None
        after: dict[int, Tensor] = {}
        for layer in range(config.layers):
            mask = masks[self.view(layer)]
            before, x = x, self.block(layer, x, mask, embedded, after.get(sources.get(layer, -1)))
            if before is not embedded and before not in after.values():
                self.drop(before)
            if layer in sources.values() or layer == config.backout - 1:
                after[layer] = x
        if config.backout:
            middle = after[config.backout - 1]
            result = stream.skip(self, "backout", x, middle, gated=False)
            if x not in after.values():
                self.drop(x)
            x = result
        self.module = "norm"
        y = self.norm("norm", x)
        self.module = "head"
        if self.kernels.triton:
            result = self.fused_loss(y)
            self.drop(y)
        else:
            rows = padded_vocabulary(config)
            logits = fp8.head(self, y, rows) if config.fp8 else self.linear("head", y, rows, "logits and loss")
            self.drop(y)
            self.module = ""
            result = self.loss(logits)
        made = dict.fromkeys(tensor for mask in masks.values() for tensor in mask)  # views share some
        self.drop(x, result, *made, *([embedded] if embedded else []), *after.values())

    def embedding(self) -> Tensor:
        """Keeps 8·s (the positions, int64) where they are learned; a norm of its own follows in the RMSNorm model."""
        config = self.config
        x = self.new("embedding", "tokens", self.tokens * config.width, self.stream_size)
        if config.positions == "learned":
            index = self.new("embedding", "position indices", self.time, 8)
            self.keep("embedding", index)
            positions = self.new("embedding", "positions", self.time * config.width, self.stream_size)
            tokens, x = x, self.new("embedding", "sum", self.tokens * config.width, self.stream_size)
            self.drop(tokens, positions, index)
        if config.norm == "rms":
            tokens, x = x, self.norm("norm", x)
            self.drop(tokens)
        return x

    def block(
        self, layer: int, x: Tensor, mask: list[Tensor], embedded: Tensor | None, earlier: Tensor | None
    ) -> Tensor:
        """A checkpointed block keeps its input, r·n·h, and all blocks together the mask, b·s².

        What skips read (`embedded`, `earlier`) is input too.

        Selective checkpointing adds the outputs of q, k, v, attention and its output projection, 5·c·n·h + 4·n·a, and
        of the MLP's up-projection, c·n·m. The down-projection's goes only into the next block's input.
        """
        config, name, before = self.config, f"blocks.{layer}", x
        self.module = name
        if config.checkpointing != "none":
            self.keep("residual", x, *([embedded] if embedded else []), *([earlier] if earlier else []))
            self.keep("masks", *mask)
        self.checkpointing = config.checkpointing
        if earlier:
            x = stream.skip(self, f"{name}.skip", x, earlier, gated=bool(config.block_skip))
        if embedded:
            read, x = x, stream.embedding_skip(self, f"{name}.embedding_skip", x, embedded)
            if read is not before:
                self.drop(read)
        self.module = f"{name}.norm1"
        y = self.norm("norm", x)
        values = None
        if layer in config.value_embeddings:
            values = stream.value_embedding(self, f"{name}.value_embedding")
        y = attention.attention(self, layer, y, mask, values)
        self.module = name
        middle = self.new("residual", "after attention", x.elements, self.stream_size)
        self.drop(y)
        if x is not before:
            self.drop(x)
        self.module = f"{name}.norm2"
        y = self.norm("norm", middle)
        y = self.mlp(f"{name}.mlp", y)
        self.module = name
        output = self.new("residual", "after MLP", x.elements, self.stream_size)
        self.drop(y, middle)
        self.checkpointing = "none"
        return output

    def mlp(self, name: str, y: Tensor) -> Tensor:
        """Keeps c·n·h, the input, and 2·c·n·m: ReLU² keeps ReLU's output and its square, GELU its input and output.

        Fused, ReLU² keeps its output alone, c·n·m. In torch's kernels on a GPU autocast squares a float32 copy, which
        is kept too, +4·n·m.
        """
        config = self.config
        self.module = f"{name}.up"
        width = config.mlp_width or 4 * config.width
        fused = (self.kernels.triton or config.fp8) and config.mlp == "relu2" and not config.bias
        hidden = fp8.mlp_up(self, y, width) if config.fp8 else self.linear("mlp up", y, width, cached=not fused)
        self.module = name
        if fused:
            active = hidden
        elif config.mlp == "relu2":
            relu = self.new("activation", "ReLU", hidden.elements, self.product_size)
            self.keep("activation", relu)
            squared = relu
            if self.kernels.cuda and self.autocast:
                squared = self.new("activation", "float32 ReLU", hidden.elements, 4)
                self.keep("activation", squared)
            active = self.new("activation", "square", hidden.elements, squared.size)
            self.drop(relu, hidden, *([] if squared is relu else [squared]))
        else:
            self.keep("activation", hidden)
            active = self.new("activation", "GELU", hidden.elements, self.product_size)
            self.drop(hidden)
        self.module = f"{name}.down"
        result = (
            fp8.mlp_down(self, active, config.width) if config.fp8 else self.linear("mlp down", active, config.width)
        )
        self.drop(y, active)
        return result

    def loss(self, product: Tensor) -> Tensor:
        """Keeps 4·n·V, the logarithms of probabilities, and as much again for the softcap's tanh.

        With tokens further on in the loss see `multi_token_loss`. At the peak there are also the logits themselves,
        4·n·V, and with the softcap the uncapped ones.
        """
        part, elements = "logits and loss", self.tokens * self.config.vocab_size
        logits = product
        if product.size < 4:
            logits = self.new(part, "float32 logits", elements, 4)
            self.drop(product)
        if self.config.softcap:
            shifted = [self.new(part, "logits + 5", elements, 4)] if self.config.softcap_form == "sigmoid" else []
            divided = self.new(part, "logits / cap", elements, 4)
            self.drop(*shifted)
            bounded = self.new(part, "tanh", elements, 4)
            self.keep(part, bounded)
            self.drop(divided)
            uncapped, logits = logits, self.new(part, "capped logits", elements, 4)
            self.drop(uncapped)
        probabilities = self.new(part, "log probabilities", elements, 4)
        if self.future:
            result = stream.multi_token_loss(self, probabilities)
            self.drop(logits)
            return result
        result, weight = self.new(part, "loss", 1, 4), self.new(part, "number of targets", 1, 4)
        self.keep(part, probabilities, weight)
        self.drop(logits)
        return result

    def fused_loss(self, y: Tensor) -> Tensor:
        """`speedrun.kernels.cross_entropy`. Keeps its gradients by the input, c·n·h, and by the weight, 4·V'·h.

        While it runs: autocast's copies of input and weight, and two blocks of logits, since the product that makes a
        block's is done before the block before it is let go; or one, and a block's share of the weight's gradient.
        """
        part, size, width = "logits and loss", self.product_size, self.config.width
        vocabulary, future, in_fp8 = padded_vocabulary(self.config), self.future, self.config.fp8
        targets = [self.new(part, "targets", self.tokens * (1 + future), 8)] if future else []
        rows = self.new(part, "cast input", y.elements, size) if y.size > size else y
        result = self.new(part, "loss", 1, 4)
        gradients = self.new(part, "gradient by the input", y.elements, size)
        gradients_of_weight = self.new(part, "gradient by the weight", vocabulary * width, 4)
        self.keep(part, gradients, gradients_of_weight)
        inside = [
            self.new(part, what, bytes, 1)
            for what, bytes in fused_loss_inside(self.tokens, vocabulary, width, size, self.autocast, in_fp8)
        ]
        self.drop(*inside, *targets, *([] if rows is y else [rows]))
        return result


def fused_loss_inside(
    tokens: int, vocabulary: int, width: int, size: int, cast: bool, in_fp8: bool
) -> list[tuple[str, int]]:
    """What the fused loss holds inside where it holds most: (what, bytes). size: bytes of an element of a product;
    cast: the head's weight is cast to that, where it is not in FP8.
    """
    if in_fp8:
        return fp8.fused_loss_inside(tokens, vocabulary, width, size, LOSS_ROWS)
    blocks = [min(LOSS_ROWS, tokens - start) * vocabulary * size for start in range(0, tokens, LOSS_ROWS)]
    two = [("block of logits", bytes) for bytes in blocks[:2]]
    one = [("block of logits", blocks[0]), ("block's gradient by the weight", vocabulary * width * 4)]
    weight = [("cast weight", vocabulary * width * size)] if cast else []
    return weight + max(two, one, key=lambda held: sum(bytes for _, bytes in held))
