"""From logits to the loss: the softcap, and cross-entropy over the next token or over several to come."""

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun.config import SIGMOID_MIDDLE, SIGMOID_SCALE, ModelConfig


def softcap(logits: Tensor, config: ModelConfig) -> Tensor:
    """Bounded logits, elementwise, or the logits themselves where config.softcap is 0.

    tanh: c·tanh(z/c), near z for small z and between −c and c (Gemma 2, arXiv 2408.00118; c = 30, later 15, in
    modded-nanogpt, records 9 and 18). sigmoid: c·σ((z + 5)/7.5), between 0 and c, with c = 23 in later records. A
    constant added to all logits changes no probability, so this too is tanh, of half the range, about another point:
    logits that start at zero lie off its middle, and there is more room below them than above.
    """
    cap = config.softcap
    if not cap:
        return logits
    if config.softcap_form == "sigmoid":
        return cap * torch.sigmoid((logits - SIGMOID_MIDDLE) / SIGMOID_SCALE)
    return cap * torch.tanh(logits / cap)


def future_targets(targets: Tensor, ahead: int, document_start: int | None) -> Tensor:
    """The target `ahead` places after each one, of the same shape; −1 where that lies in another row or document.

    A document's end, that is the token that opens the next one, still belongs to it.
    """
    inside = torch.arange(targets.shape[1], device=targets.device) < targets.shape[1] - ahead
    if document_start is not None:
        for before in range(ahead):
            inside = inside & (targets != document_start).roll(-before, dims=1)
    return torch.where(inside, targets.roll(-ahead, dims=1), -1)


def all_targets(targets: Tensor, ahead: int, document_start: int | None) -> Tensor:
    """The next tokens and those up to `ahead` places after them: int64 [batch, time, 1 + ahead]."""
    return torch.stack([future_targets(targets, k, document_start) for k in range(ahead + 1)], dim=-1)


def multi_token_loss(
    logits: Tensor, targets: Tensor, weights: tuple[float, ...], document_start: int | None, reduction: str
) -> Tensor:
    """Cross-entropy of the next token plus Σ_k weights[k−1] · that of the token k places further on, in nats.

    The same logits predict all of them: what may follow soon is made likely before it is due, which costs nothing but
    a look-up and hastens early learning (weights .5 and .25 in modded-nanogpt, record 53; heads of their own: Gloeckle
    et al. 2024, arXiv 2404.19737). logits [batch, time, vocab_size]; targets int64 [batch, time], −1 for none.

    "mean" divides by the number of *next* tokens whatever the others' numbers, which depend on where documents end:
    equal rows then count alike on every rank.
    """
    logs = F.log_softmax(logits, dim=-1)
    wanted = all_targets(targets, len(weights), document_start)
    found = logs.gather(-1, wanted.clamp(min=0)) * (wanted >= 0)
    loss = -found[..., 0].sum()
    for k, weight in enumerate(weights, start=1):
        loss = loss - weight * found[..., k].sum()
    return loss / (targets >= 0).sum() if reduction == "mean" else loss
