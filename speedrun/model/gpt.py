"""The GPT: tokens in, logits or a loss out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from speedrun.attention_choice import Kind, choose_attention
from speedrun.config import ModelConfig
from speedrun.kernels import use_triton
from speedrun.model.attend import where
from speedrun.model.attention import Attention
from speedrun.model.embeddings import NgramEmbedding, Smear, ValueEmbedding
from speedrun.model.head import GivenHead, Head
from speedrun.model.initial import initial_values
from speedrun.model.loss import all_targets, multi_token_loss, softcap
from speedrun.model.masks import Mask, View, layer_masks
from speedrun.model.mlp import MLP
from speedrun.model.norm import make_norm, rms_norm
from speedrun.model.skips import EmbeddingSkip, GatedSkip, Skip
from speedrun.model.untying import UntyingEmbedding
from speedrun.wiring import check_model, ngram_tables, padded_vocabulary, skip_sources
from strategies.errors import UserError


class Block(nn.Module):
    """One transformer block: attention, then MLP, each reading a normalised copy of the stream and adding to it.

    What changes a single block (value embeddings, attention gates, ...) belongs here or in the file of its part.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.skip: nn.Module | None = None
        if layer in skip_sources(config):
            self.skip = GatedSkip() if config.block_skip else Skip()
        self.embedding_skip = EmbeddingSkip() if config.embedding_skip else None
        self.norm1 = make_norm(config)
        self.value_embedding: ValueEmbedding | None = None
        if layer in config.value_embeddings:
            self.value_embedding = ValueEmbedding(config, padded_vocabulary(config))
        self.attention = Attention(config, layer)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)
        self.checkpointing = config.checkpointing

    def forward(
        self,
        x: Tensor,
        mask: Mask | None = None,
        tokens: Tensor | None = None,
        embedded: Tensor | None = None,
        earlier: Tensor | None = None,
    ) -> Tensor:
        """x [batch, time, width] → the same shape; mask as from `layer_masks`, or None for plain causal attention.

        For a value embedding the tokens, int64 [batch, time]; for an embedding skip the stream before the first block,
        for a skip the stream after an earlier one: both [batch, time, width].
        """
        if self.checkpointing == "none":
            return self._compute(x, mask, tokens, embedded, earlier)
        # In here, not around the block: FSDP gathers and frees parameters in hooks on the block, and these then run
        # once per pass. The model draws no random numbers, so there is no generator to wind back.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.checkpointing == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
        return checkpoint(self._compute, x, mask, tokens, embedded, earlier, **options)

    def _compute(
        self, x: Tensor, mask: Mask | None, tokens: Tensor | None, embedded: Tensor | None, earlier: Tensor | None
    ) -> Tensor:
        if self.skip is not None:
            x = self.skip(x, earlier)
        if self.embedding_skip is not None:
            x = self.embedding_skip(x, embedded)
        x = x + self._attend(x, mask, tokens)
        x = x + self.mlp(self.norm2(x))
        return x

    def _attend(self, x: Tensor, mask: Mask | None, tokens: Tensor | None) -> Tensor:
        y = self.norm1(x)
        values = None if self.value_embedding is None else self.value_embedding(tokens, y)
        return self.attention(y, mask, values)


MATRIX_PRODUCT = torch.ops.aten.mm.default
"""What a linear layer becomes, beside the sum with its bias. Not bmm, which unfused attention uses for its scores."""
FUSED_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
VARIABLE_LENGTH_ATTENTION = "torch_attn._varlen_attn."
FUSED_LINEAR = ("speedrun.linear_relu2.", "speedrun.fp8_linear.")
"""The MLP's layers from `speedrun.kernels`."""


def keep_products(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    """Selective checkpointing's rule: keep what matrix products and fused attention give, compute the rest again.

    The rest (norms, rotations, ReLU² or GELU, casts, sums) is half of a block's bytes and next to none of its
    arithmetic. A product that makes its rows shorter is the MLP's last: its output goes only into the sum that is the
    next block's input, which is kept, and backward stops computing again before it gets there. (Korthikanti et al.
    2022, arXiv 2205.05198, recompute attention's score matrices instead; fused attention has none to begin with.)

    FlexAttention is computed again: no dispatch mode sees it (speedrun/model/flex.py), and so none keeps its output.
    """
    if operator == MATRIX_PRODUCT:
        rows, matrix = args
        keep = rows.shape[1] <= matrix.shape[1]
    elif str(operator).startswith(FUSED_LINEAR):
        rows, weight = args[:2]
        keep = rows.shape[1] <= weight.shape[0]
    else:
        keep = operator in FUSED_ATTENTION or str(operator).startswith(VARIABLE_LENGTH_ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class GPT(nn.Module):
    """A decoder-only transformer, and its cross-entropy.

    `document_start` is the token that opens a document: where it is given, attention never crosses into another
    document; where it is None, a row is one text. Weights are torch's defaults until `init_weights` is called; those of
    a model on the meta device are nowhere until a strategy gives them memory and values (`initial`).

    What connects blocks with one another (skips, a second look at the embedding, ...) belongs into `forward`.

    Raises ValueError for a shape that cannot be built (see `Attention`).
    """

    def __init__(self, config: ModelConfig, *, document_start: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.document_start = document_start
        check_model(config)
        rows = padded_vocabulary(config)
        self.embed: nn.Module = nn.Embedding(rows, config.width)
        if config.untie_at:
            self.embed = UntyingEmbedding(rows, config.width)
        self.positions: nn.Embedding | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_sequence_length, config.width)
        for name, (length, table) in ngram_tables(config).items():
            self.add_module(name, NgramEmbedding(config, length, table))
        self.smear = Smear() if config.smear else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.backout = Skip() if config.backout else None
        self.norm = make_norm(config)
        self.head: nn.Module = GivenHead(config) if config.untie_at else Head(config, rows)
        self._tie()

    def _tie(self) -> None:
        if self.config.tied_head and not self.config.untie_at:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        future_weights: tuple[float, ...] = (),
        tied: bool = False,
    ) -> Tensor:
        """Logits of the next token, or the loss where targets are given.

        tokens: int64 [batch, time]. targets: int64 [batch, time], the token that follows each one, −1 where there is
        nothing to predict. Returns logits [batch, time, vocab_size], or the scalar cross-entropy in nats, summed over
        the targets that are not −1 or averaged over them (nan where there is none). Both are float32, whatever the
        compute dtype (float64 for a float64 model).

        future_weights adds tokens after the next one to the loss (`multi_token_loss`); tied says that a head which is
        untied in the course of the run (config.untie_at) still is the embedding. Both as the schedule has them, and
        left out in an evaluation.

        Raises ValueError where a row is longer than `max_sequence_length`.
        """
        time = tokens.shape[1]
        if time > self.config.max_sequence_length:
            raise UserError(
                f"a row of {time} tokens is longer than model.max_sequence_length = {self.config.max_sequence_length}: "
                "shorten data.sequence_length or raise model.max_sequence_length"
            )
        x, *head = self.embed(tokens, tied) if self.config.untie_at else (self.embed(tokens),)
        if self.positions is not None:
            x = x + self.positions(torch.arange(time, device=tokens.device))
        if self.config.norm == "rms":
            x = rms_norm(x)
        for name in ngram_tables(self.config):
            x = x + getattr(self, name)(tokens, self.document_start)
        if self.smear is not None:
            x = self.smear(x, tokens, self.document_start)
        masks = self._masks(tokens, x.dtype)
        sources = skip_sources(self.config)
        embedded = x if self.config.embedding_skip else None
        after: dict[int, Tensor] = {}  # the stream after those blocks that someone reads later
        for layer, (block, mask) in enumerate(zip(self.blocks, masks, strict=True)):
            own_tokens = tokens if layer in self.config.value_embeddings else None
            x = block(x, mask, own_tokens, embedded, after.get(sources.get(layer, -1)))
            if layer in sources.values() or layer == self.config.backout - 1:
                after[layer] = x
        if self.backout is not None:
            x = self.backout(x, after[self.config.backout - 1])
        product = (x.shape[:-1].numel(), self.config.width, self.config.vocab_size)
        if targets is not None and use_triton(self.config.kernels, x, "cross_entropy", product):  # without logits
            if future_weights:
                targets = all_targets(targets, len(future_weights), self.document_start)
            return self.head(self.norm(x), *head, targets=targets, reduction=reduction, future=future_weights)
        logits = self._readable(self.head(self.norm(x), *head))
        if targets is None:
            return logits
        if future_weights:
            return multi_token_loss(logits, targets, future_weights, self.document_start, reduction)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)

    def _masks(self, tokens: Tensor, dtype: torch.dtype) -> list[Mask | None]:
        """Every layer's mask; dtype: of the residual stream."""
        device = tokens.device
        computed = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
        choices = self.attention_choices(tokens.shape[1], device, computed)
        views = [attention.view for attention in self.attentions]
        kinds = [choices[view][0] for view in views]
        compiled = any(block._compiled_call_impl for block in self.blocks)
        stretched = self.attentions[0].stretched(device, dtype) if compiled else None
        return layer_masks(tokens, self.document_start, views, kinds, self.config.partial_key_offset, stretched)

    def attention_choices(self, time: int, device: torch.device, dtype: torch.dtype) -> dict[View, tuple[Kind, str]]:
        """The layers' views → which attention function computes them in rows of `time` tokens, and why.

        dtype: of queries. Raises ValueError where what model.attention asks for cannot run.
        """
        here = where(device, dtype)
        views = dict.fromkeys(attention.view for attention in self.attentions)
        return {view: choose_attention(self.config.attention, here, *view.positions(time)) for view in views}

    def set_windows(self, history: Sequence[tuple[int, int]]) -> None:
        """The (short, long) attention windows of the run so far, in tokens, the present ones last."""
        for attention in self.attentions:
            attention.set_windows(history)

    @property
    def attentions(self) -> list[Attention]:
        """Of all layers."""
        return [cast(Block, block).attention for block in self.blocks]

    def _readable(self, logits: Tensor) -> Tensor:
        """Head output [..., rows] → logits [..., vocab_size]: padding cut off, float32 at least, softly capped.

        The padded columns get no probability and no gradient because they are not there any more.
        """
        logits = logits[..., : self.config.vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return softcap(logits, self.config)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set every parameter to its initial values, in whatever dtype it is, on whatever device.

        Needs memory for all of them: after `to_empty` where the model was built on the meta device. A strategy that
        shards takes a model on the meta device and `initial` instead.

        Raises ValueError where a parameter is still on the meta device.
        """
        self._tie()  # to_empty, from the meta device, makes two tensors of the one
        values = self.initial(seed)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                raise UserError(f"{name} is on the meta device: call to_empty(device=...) before init_weights")
            parameter.copy_(values(name, 0, parameter.numel()).view(parameter.shape))

    def initial(self, seed: int) -> Callable[[str, int, int], Tensor]:
        """What `init_weights` sets, in any parts: a parameter's name, start, stop → elements [start, stop) of it,
        flattened: float32, on the CPU. The model may be on the meta device, and need not stay alive."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        config = self.config
        return lambda name, start, stop: initial_values(config, seed, name, shapes[name], start, stop)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter of `GPT(config)`, in order, without allocating any. A tied head counts once."""
    with torch.device("meta"):
        model = GPT(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
