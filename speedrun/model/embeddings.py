"""What enters the stream beside a token's own embedding: n-gram embeddings, value embeddings, smear.

All of it starts without effect (tables, gates and strengths of zero) and none of it looks across the start of a row or,
where the model knows it, of a document.
"""

import torch
from torch import Tensor, nn

from speedrun.config import GATE_CHANNELS, ModelConfig

MULTIPLIERS = (36313, 27191, 51647, 44129)
"""Odd numbers that the hash of an n-gram multiplies its tokens with, the last token first."""


def hashed_rows(tokens: Tensor, length: int, rows: int, document_start: int | None) -> Tensor:
    """The table row of the n-gram that ends at each position.

    tokens: int64 [batch, time]. Returns int64 [batch, time], 1 + h mod (rows − 1) with
    h = (m0·t_i) XOR (m1·t_{i−1}) XOR …; or 0 where the n-gram would begin before its row or its document.
    """
    hashed = tokens * MULTIPLIERS[0]
    inside = torch.arange(tokens.shape[1], device=tokens.device) >= length - 1
    for back in range(1, length):
        # What rolls in from the row's end lands where `inside` is False.
        hashed = hashed ^ (tokens.roll(back, dims=1) * MULTIPLIERS[back])
        if document_start is not None:
            inside = inside & (tokens != document_start).roll(back - 1, dims=1)
    return torch.where(inside, hashed % (rows - 1) + 1, 0)


class NgramEmbedding(nn.Module):
    """A learned vector for the last n tokens together, from a hash table: scale · up(table[hash]).

    Saves the first layers the work of looking one or two tokens back. N-grams that share a row by accident share a
    vector. `up` is there where the table is narrower than the stream. (Hash embeddings: Svenstrup et al. 2017, arXiv
    1709.03933; for bigrams in modded-nanogpt, record 62.)
    """

    def __init__(self, config: ModelConfig, length: int, rows: int) -> None:
        super().__init__()
        self.length, self.rows = length, rows
        self.table = nn.Embedding(rows, config.ngram_width or config.width)
        self.up = nn.Linear(config.ngram_width, config.width, bias=False) if config.ngram_width else None
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor, document_start: int | None) -> Tensor:
        """tokens: int64 [batch, time] → [batch, time, width]."""
        x = self.table(hashed_rows(tokens, self.length, self.rows, document_start))
        return self.scale * (x if self.up is None else self.up(x))


class Smear(nn.Module):
    """Every position takes in a little of the one before it: x_t ← x_t + λ·σ(w·x_t[:12])·x_{t−1}.

    One learned strength λ and one gate w, both zero at the start. (modded-nanogpt, record 34.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(GATE_CHANNELS, 1, bias=False)
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, tokens: Tensor, document_start: int | None) -> Tensor:
        """x [batch, time, width], tokens int64 [batch, time] → the shape of x."""
        channels = x[:, 1:, :GATE_CHANNELS].contiguous()  # 12 channels are kept for backward, not the stream again
        share = self.strength * torch.sigmoid(self.gate(channels))
        if document_start is not None:
            share = share * (tokens[:, 1:, None] != document_start)
        return torch.cat((x[:, :1], x[:, 1:] + share * x[:, :-1]), dim=1)


class ValueEmbedding(nn.Module):
    """A second embedding of the token, for one layer's values: 2σ(W·[x[:6], e[:6]])·e, one gate per head.

    Added to v it lets attention hand on which token stood somewhere without the stream having to carry that. The table
    and W start at zero, where the gate is one. (Zhou et al. 2024, arXiv 2410.17897, mix the first layer's values into
    later ones; tables of their own: modded-nanogpt, record 14.)
    """

    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.table = nn.Embedding(rows, config.width)
        self.gate = nn.Linear(GATE_CHANNELS, config.heads, bias=False)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        """tokens int64 [batch, time], x [batch, time, width] as attention reads it → [batch, time, heads, head_dim]."""
        values = self.table(tokens)
        half = GATE_CHANNELS // 2
        gate = 2 * torch.sigmoid(self.gate(torch.cat((x[..., :half], values[..., :half]), dim=-1)))
        return gate[..., None] * values.view(*tokens.shape, self.heads, -1)
