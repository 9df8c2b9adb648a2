"""Causal self-attention: each position reads from the positions before it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from speedrun.config import GATE_CHANNELS, ModelConfig
from speedrun.model.attend import attend
from speedrun.model.linear import Linear
from speedrun.model.masks import Mask, View, Yarn
from speedrun.model.norm import rms_norm
from speedrun.model.rope import rope_frequencies, rotate, rotations, yarn_scale
from speedrun.wiring import check_attention


class Attention(nn.Module):
    """Multi-head attention, softmax(scale · q·kᵀ)·v per head, with rotary positions and QK-norm where configured.

    q, k, v and out are four matrices, not one packed tensor: Muon orthogonalises matrices, and these are four.

    Raises ValueError where heads do not divide the width, RoPE cannot pair the channels of a head, or options conflict.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        check_attention(config)
        self.heads = config.heads
        self.head_dim = config.width // config.heads
        self.rotated_channels = {"rope": self.head_dim, "half_rope": self.head_dim // 2, "learned": 0}[config.positions]
        self.rope_base = config.rope_base
        self.qk_norm = config.qk_norm
        self.long = layer in config.long_layers
        self.paired = layer in config.paired_head_layers
        self.key_offset = config.partial_key_offset and self.long
        self.yarn = config.yarn
        self.base_scale = config.attention_scale or None
        self.q = Linear(config.width, config.width, bias=config.bias)
        self.k = Linear(config.width, config.width, bias=config.bias)
        self.v = Linear(config.width, config.width, bias=config.bias)
        self.out = Linear(config.width, config.width, bias=config.bias)
        self.gate = nn.Linear(GATE_CHANNELS, config.heads, bias=False) if config.attention_gate else None
        self.set_windows([(config.window_short, config.window_long)])

    def set_windows(self, history: Sequence[tuple[int, int]]) -> None:
        """The (short, long) windows of the run so far, the present ones last. YaRN depends on all that have been."""
        self.view = View(history[-1][1] if self.long else history[-1][0], self.paired)
        self.long_windows = tuple(long for _, long in history) if self.yarn else ()
        self.scale = self.base_scale
        if self.yarn:
            self.scale = (self.base_scale or self.head_dim**-0.5) * yarn_scale(self.long_windows)

    def frequencies(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """RoPE's, [rotated channels / 2]; dtype: of the stream, below float32 they are float32."""
        dtype = torch.promote_types(dtype, torch.float32)
        return rope_frequencies(self.rotated_channels, self.rope_base, device, dtype, self.long_windows)

    def stretched(self, device: torch.device, dtype: torch.dtype) -> Yarn | None:
        """For `Mask.yarn`: where YaRN is on, frequencies and scale as tensors, which stay out of compiled code."""
        if not self.yarn or self.scale is None:
            return None
        frequencies = self.frequencies(device, dtype)
        return Yarn(frequencies, frequencies.new_full((), self.scale))

    def forward(self, x: Tensor, mask: Mask | None = None, value_embedding: Tensor | None = None) -> Tensor:
        """x [batch, time, width] → the same shape; mask as from `layer_masks`, or None for plain causal attention.

        value_embedding: [batch, time, heads, head_dim], added to the values (`ValueEmbedding`).
        """
        batch, time, width = x.shape
        q = self.q(x).view(batch, time, self.heads, self.head_dim)
        k = self.k(x).view(batch, time, self.heads, self.head_dim)
        v = self.v(x).view(batch, time, self.heads, self.head_dim)
        if value_embedding is not None:
            v = v + value_embedding.to(v.dtype)
        if self.qk_norm:  # bounds every score by √head_dim, however large the weights grow (arXiv 2010.04245)
            # Autocast on CUDA has RMSNorm in its list of float32 operators (from torch 2.12 on), and attention
            # functions want one dtype: v's, which the matrix product has given it.
            q, k = rms_norm(q).to(v.dtype), rms_norm(k).to(v.dtype)
        if self.paired:
            q, k, v = pair(q), pair(k), pair(v)
        stretched = None if mask is None else mask.yarn
        if self.rotated_channels:
            cos, sin = rotations(
                q.shape[1], self.frequencies(x.device, q.dtype) if stretched is None else stretched.frequencies
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.key_offset:
            k = offset_keys(k, self.rotated_channels, None if mask is None else mask.continues)
        if stretched is not None:
            y = attend((q * stretched.scale).to(v.dtype), k, v, mask, 1.0)  # no constant, which each stage would change
        else:
            y = attend(q, k, v, mask, self.scale)
        if self.paired:
            y = unpair(y)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS]))[..., None]
        return self.out(y.reshape(batch, time, width))


def pair(x: Tensor) -> Tensor:
    """[batch, time, heads, head_dim] → [batch, 2 · time, heads / 2, head_dim]: paired heads.

    Heads 2h and 2h + 1 become one head over a sequence twice as long, in which token t stands at positions 2t and
    2t + 1. So the second of two heads also sees what the first one has for the same token, and both see each other's
    keys of all earlier ones: twice as many keys to choose from, at twice the work.
    """
    batch, time, heads, head_dim = x.shape
    return x.view(batch, time, heads // 2, 2, head_dim).transpose(2, 3).reshape(batch, 2 * time, heads // 2, head_dim)


def unpair(x: Tensor) -> Tensor:
    """The inverse of `pair`."""
    batch, time, heads, head_dim = x.shape
    return (
        x.reshape(batch, time // 2, 2, heads, head_dim).transpose(2, 3).reshape(batch, time // 2, 2 * heads, head_dim)
    )


def offset_keys(k: Tensor, rotated_channels: int, continues: Tensor | None) -> Tensor:
    """Partial key offset: the channels of a key that carry no position are those of the token before.

    k: [batch, time, heads, head_dim], of which the channels from `rotated_channels` on are shifted; continues: bool
    [batch, time], False at a document's first token, which keeps its own, as the first one of a row does (None: only
    that one). One layer can then do what takes two otherwise: find an earlier token by the one that stood before it
    and read what came next (an induction head).
    """
    rotated, still = k.split([rotated_channels, k.shape[-1] - rotated_channels], dim=-1)
    before = torch.cat((still[:, :1], still[:, :-1]), dim=1)
    if continues is not None:
        before = torch.where(continues[:, :, None, None], before, still)
    return torch.cat((rotated, before), dim=-1)
