"""Which positions a position may attend to: earlier ones, of its own document, within its layer's window.

The same rule in the three forms that attention functions take (speedrun/model/attend.py): a boolean mask, a block mask
for FlexAttention, and the lengths of documents for variable-length attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speedrun.attention_choice import Kind

BLOCK = 128
"""Queries, and keys, of a block that FlexAttention skips or computes as a whole (its default)."""


class View(NamedTuple):
    """How a layer looks back."""

    window: int = 0
    """The distance to the furthest key that a query sees, in tokens; 0: no limit."""
    paired: bool = False
    """The layer attends over a sequence of two positions per token (see `speedrun.model.attention.pair`)."""

    def positions(self, time: int) -> tuple[int, int]:
        """(window, length) of a row of `time` tokens in positions, which are what an attention function counts. A
        window that no two positions of the row are apart is none: 0.
        """
        window = self.window if self.window < time - 1 else 0
        return (2 * window, 2 * time) if self.paired else (window, time)


@dataclass(frozen=True, eq=False)
class Mask:
    """What a layer's attention needs to know beside q, k and v. (No mask at all means plain causal attention.)

    What stages change (windows; YaRN's frequencies and scale for compiled blocks) is here as tensors: compiled code is
    made for constants, and would be compiled again for every stage. No engine casts these tensors, as it would a
    module's (DeepSpeed) or those among a block's arguments (FSDP2): none looks into this object.
    """

    kind: Kind = "sdpa"
    """The attention function that it is for: sdpa has `dense`, flex `blocks` and `first`, the others `lengths`."""
    dense: Tensor | None = None
    """bool [batch or 1, 1, time, time], True where the query (third dimension) may look at the key (fourth); None for
    every earlier key."""
    blocks: Any = None
    """A FlexAttention BlockMask."""
    first: Tensor | None = None
    """int32 [batch, time]: the first position that each query sees (`first_seen`)."""
    lengths: Tensor | None = None
    """int32 [documents + 1]: where each document of the batch begins, rows end to end, and the end."""
    longest: int = 0
    """For `lengths`: positions of a row, which no document exceeds."""
    window: int = 0
    """For `lengths`: as in View, in positions."""
    continues: Tensor | None = None
    """bool [batch, time]: the token before belongs to the same document. For `partial_key_offset`."""
    yarn: "Yarn | None" = None
    """Where YaRN is on and blocks are compiled."""


class Yarn(NamedTuple):
    """What YaRN has made of positions and scores after the run's windows so far, the same for all layers."""

    frequencies: Tensor
    """Of `speedrun.model.rope.rope_frequencies`: [rotated channels / 2]."""
    scale: Tensor
    """The factor on attention scores, of no dimension, in the dtype of `frequencies`."""


def layer_masks(
    tokens: Tensor,
    document_start: int | None,
    views: Sequence[View],
    kinds: Sequence[Kind],
    continues: bool = False,
    yarn: Yarn | None = None,
) -> list[Mask | None]:
    """The masks of all layers, of which those that come to the same share one: windows that no row is long enough for
    are none.

    tokens: int64 [batch, time]; document_start: as in `document_numbers`, None where a row is one text; kinds: each
    layer's attention function, equal for equal views; continues, yarn: fill in that field. A paired view has twice as
    many positions, and its window counts them.
    """
    batch, time = tokens.shape
    documents = None if document_start is None else document_numbers(tokens, document_start)
    same = _continues(documents) if continues and documents is not None else None
    lengths = None
    if any(kind in ("varlen", "flash") for kind in kinds):
        lengths = document_lengths(documents, batch, time, tokens.device)
    made: dict[tuple[int, int], Mask | None] = {}
    for view, kind in zip(views, kinds, strict=True):
        window, positions = view.positions(time)
        if (window, positions) in made:
            continue
        twice = 2 if view.paired else 1
        numbers = documents
        if documents is not None and view.paired:
            numbers = documents.repeat_interleave(2, dim=1)
        if kind == "flex":
            first = first_seen(numbers, batch, positions, window, tokens.device)
            made[window, positions] = Mask(kind, blocks=block_mask(first), first=first, continues=same, yarn=yarn)
        elif kind == "sdpa":
            dense = None
            if numbers is not None or window:
                dense = dense_mask(numbers, positions, window, tokens.device)
            made[window, positions] = (
                None if dense is None and yarn is None else Mask(dense=dense, continues=same, yarn=yarn)
            )
        else:
            assert lengths is not None
            own = lengths * twice
            made[window, positions] = Mask(
                kind, lengths=own, longest=positions, window=window, continues=same, yarn=yarn
            )
    return [made[view.positions(time)] for view in views]


def document_numbers(tokens: Tensor, document_start: int) -> Tensor:
    """Which document of its row each token belongs to: int64 [batch, time], the token `document_start` opens one.

    What stands before the first one belongs to a document that began earlier.
    """
    return (tokens == document_start).cumsum(dim=1)


def _continues(documents: Tensor) -> Tensor:
    return documents.diff(dim=1, prepend=documents[:, :1] - 1) == 0


def document_mask(tokens: Tensor, document_start: int, window: int = 0) -> Tensor:
    """`dense_mask` for tokens [batch, time], documents as in `document_numbers`."""
    return dense_mask(document_numbers(tokens, document_start), tokens.shape[1], window, tokens.device)


def dense_mask(documents: Tensor | None, time: int, window: int, device: torch.device) -> Tensor:
    """The mask of causal attention within documents and a window, for `scaled_dot_product_attention`.

    documents: int64 [batch, time] or None; window: positions, 0 for no limit. Returns bool [batch or 1, 1, time, time];
    dimension 1 stands for all heads. Every query sees itself, so no row of the softmax is empty.

    Boolean, because a mask of floats would have to follow the compute dtype through every kind of mixed precision.
    """
    near = torch.ones(time, time, dtype=torch.bool, device=device).tril()
    if window:
        near = near.triu(-window)
    if documents is None:
        return near[None, None]
    same_document = documents[:, :, None] == documents[:, None, :]
    return (same_document & near)[:, None]


def first_seen(documents: Tensor | None, batch: int, time: int, window: int, device: torch.device) -> Tensor:
    """The first position that each query sees, int32 [batch, time]: of its document, and within the window.

    A query sees all positions from there to its own, and the numbers never fall along a row.
    """
    positions = torch.arange(time, device=device, dtype=torch.int32)
    first = (positions - window).clamp(min=0) if window else torch.zeros_like(positions)
    if documents is not None:
        begins = torch.where(_continues(documents), 0, positions).cummax(dim=1).values
        first = torch.maximum(first, begins)
    return first.expand(batch, time).contiguous()


def block_mask(first: Tensor) -> Any:
    """The mask for FlexAttention, from `first_seen`: which blocks of 128 × 128 pairs nobody sees, which it skips, and
    which are seen whole, where it need not ask for single pairs.

    The same as torch's `create_block_mask` makes, which looks at all pairs (and is compiled for that, once more for
    every window). Here the ends of a block say it: its queries see one stretch of keys, from what its first query sees
    first to its last query, and all of them see what lies from its last query's first key to its first query.
    """
    from torch.nn.attention.flex_attention import BlockMask

    time = first.shape[1]
    begin = torch.arange(0, time, BLOCK, device=first.device)
    end = begin + BLOCK - 1
    last = end.clamp(max=time - 1)
    seen = (begin <= last[:, None]) & (end >= first[:, begin, None])  # [batch, blocks of queries, blocks of keys]
    whole = (begin >= first[:, last, None]) & (end <= begin[:, None]) & (end < time)[:, None]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[b, query])

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(time, time)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [batch, n, n] → for every block of queries how many blocks of keys are marked, int32 [batch, 1, n], and
    their numbers first, in order, int32 [batch, 1, n, n].
    """
    numbers = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32)[:, None], numbers.to(torch.int32)[:, None]


def document_lengths(documents: Tensor | None, batch: int, time: int, device: torch.device) -> Tensor:
    """Where each document begins when the rows stand end to end, and the end: int32 [documents + 1].

    How many there are only the device knows: the call waits for it.
    """
    begins = torch.arange(0, batch * time, time, device=device)
    if documents is not None:
        begins = torch.nonzero(~_continues(documents).flatten()).flatten()
    return torch.cat((begins, begins.new_tensor([batch * time]))).to(torch.int32)
