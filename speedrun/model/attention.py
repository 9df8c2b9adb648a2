"""Causal self-attention: each position reads from the positions before it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun.config import ModelConfig
from speedrun.model.norm import rms_norm
from speedrun.model.rope import rope_tables, rotate


class Attention(nn.Module):
    """Multi-head attention, softmax(q·kᵀ / √head_dim)·v per head, with rotary positions and QK-norm where configured.

    q, k, v and out are four matrices, not one packed tensor: Muon orthogonalises matrices, and these are four.

    Raises ValueError where heads do not divide the width, or RoPE cannot pair the channels of a head.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ValueError(
                f"model.heads = {config.heads} does not divide model.width = {config.width}: every head needs the same "
                "whole number of channels"
            )
        self.heads = config.heads
        self.head_dim = config.width // config.heads
        multiple = {"rope": 2, "half_rope": 4, "learned": 1}[config.positions]
        if self.head_dim % multiple:
            raise ValueError(
                f"model.positions = {config.positions} rotates channels in pairs and needs a head dimension (width / "
                f"heads) divisible by {multiple}, but it is {self.head_dim}: change model.width or model.heads"
            )
        self.rotated_channels = {"rope": self.head_dim, "half_rope": self.head_dim // 2, "learned": 0}[config.positions]
        self.rope_base = config.rope_base
        self.qk_norm = config.qk_norm
        self.q = nn.Linear(config.width, config.width, bias=config.bias)
        self.k = nn.Linear(config.width, config.width, bias=config.bias)
        self.v = nn.Linear(config.width, config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, value_embedding: Tensor | None = None) -> Tensor:
        """x [batch, time, width] → the same shape; mask as from `document_mask`, or None for plain causal attention.

        value_embedding: [batch, time, heads, head_dim], added to the values (`ValueEmbedding`).
        """
        batch, time, width = x.shape
        q = self.q(x).view(batch, time, self.heads, self.head_dim)
        k = self.k(x).view(batch, time, self.heads, self.head_dim)
        v = self.v(x).view(batch, time, self.heads, self.head_dim)
        if value_embedding is not None:
            v = v + value_embedding.to(v.dtype)
        if self.qk_norm:  # bounds every score by √head_dim, however large the weights grow (arXiv 2010.04245)
            q, k = rms_norm(q), rms_norm(k)
        if self.rotated_channels:
            dtype = torch.promote_types(q.dtype, torch.float32)  # float32 at least, float64 for float64
            cos, sin = rope_tables(time, self.rotated_channels, self.rope_base, x.device, dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None
        )
        return self.out(y.transpose(1, 2).reshape(batch, time, width))
