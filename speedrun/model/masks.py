"""Which positions a position may attend to, where a row holds several documents."""

import torch
from torch import Tensor


def document_mask(tokens: Tensor, document_start: int) -> Tensor:
    """The mask of causal attention within documents, for `scaled_dot_product_attention`.

    tokens: int64 [batch, time], in which the token `document_start` opens a document; what stands before the first one
    belongs to a document that began earlier. Returns bool [batch, 1, time, time], True where the query position (third
    dimension) may look at the key position (fourth); dimension 1 stands for all heads. Every query sees itself, so no
    row of the softmax is empty.

    Boolean, because a mask of floats would have to follow the compute dtype through every kind of mixed precision.
    """
    document = (tokens == document_start).cumsum(dim=1)
    same_document = document[:, :, None] == document[:, None, :]
    time = tokens.shape[1]
    causal = torch.ones(time, time, dtype=torch.bool, device=tokens.device).tril()
    return (same_document & causal)[:, None]
