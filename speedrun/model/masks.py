"""Which positions a position may attend to: earlier ones, of its own document, within its layer's window.

The same rule in the three forms that attention functions take (speedrun/model/attend.py): a boolean mask, a block mask
for FlexAttention, and the lengths of documents for FlashAttention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class View(NamedTuple):
    """How a layer looks back."""

    window: int = 0
    """The distance to the furthest key that a query sees, in tokens; 0: no limit."""
    paired: bool = False
    """The layer attends over a sequence of two positions per token (see `speedrun.model.attention.pair`)."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A layer's mask, in one of the three forms. (No mask at all means plain causal attention.)"""

    dense: Tensor | None = None
    """bool [batch or 1, 1, time, time], True where the query (third dimension) may look at the key (fourth)."""
    blocks: Any = None
    """A FlexAttention BlockMask."""
    lengths: Tensor | None = None
    """int32 [documents + 1]: where each document of the batch begins, rows end to end, and the end."""
    longest: int = 0
    """For `lengths`: tokens of a row, which no document exceeds."""
    window: int = 0
    """For `lengths`: as in View, in positions."""
    continues: Tensor | None = None
    """bool [batch, time]: the token before belongs to the same document. For `partial_key_offset`."""


def layer_masks(
    tokens: Tensor, document_start: int | None, views: Sequence[View], kind: str, continues: bool = False
) -> list[Mask | None]:
    """The masks of all layers, of which those with equal views share one.

    tokens: int64 [batch, time]; document_start: as in `document_numbers`, None where a row is one text; kind: of
    attention, as `speedrun.model.attend.choose_attention` says; continues: fill in that field. A paired view has
    twice as many positions, and its window counts them.
    """
    documents = None if document_start is None else document_numbers(tokens, document_start)
    same = _continues(documents) if continues and documents is not None else None
    made = {view: _mask(tokens, documents, view, kind, same) for view in dict.fromkeys(views)}
    return [made[view] for view in views]


def _mask(tokens: Tensor, documents: Tensor | None, view: View, kind: str, continues: Tensor | None) -> Mask | None:
    batch, time = tokens.shape
    window = view.window if view.window < time - 1 else 0  # no pair is further apart
    if view.paired:
        time, window = 2 * time, 2 * window
        documents = None if documents is None else documents.repeat_interleave(2, dim=1)
    if kind == "flex":
        return Mask(blocks=block_mask(documents, batch, time, window, tokens.device), continues=continues)
    if kind == "flash":
        lengths = document_lengths(documents, batch, time, tokens.device)
        return Mask(lengths=lengths, longest=time, window=window, continues=continues)
    if documents is None and not window:
        return None
    return Mask(dense=dense_mask(documents, time, window, tokens.device), continues=continues)


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


def block_mask(documents: Tensor | None, batch: int, time: int, window: int, device: torch.device) -> Any:
    """The same for FlexAttention: blocks of 128 × 128 pairs, of which it skips those that nobody sees.

    On a GPU it is made by compiled code, which never holds all pairs; on a CPU all of them are looked at.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window:
            seen = seen & (query - key <= window)
        return seen if documents is None else seen & (documents[b, query] == documents[b, key])

    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(visible, None if documents is None else batch, None, time, time, device=device)


def document_lengths(documents: Tensor | None, batch: int, time: int, device: torch.device) -> Tensor:
    """Where each document begins when the rows stand end to end, and the end: int32 [documents + 1].

    How many there are only the device knows: the call waits for it.
    """
    begins = torch.arange(0, batch * time, time, device=device)
    if documents is not None:
        begins = torch.nonzero(~_continues(documents).flatten()).flatten()
    return torch.cat((begins, begins.new_tensor([batch * time]))).to(torch.int32)
