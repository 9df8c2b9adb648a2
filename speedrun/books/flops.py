"""Floating-point operations of a step. Plain Python without torch."""

from speedrun.config import Config


def flops(config: Config, rows: int) -> float:
    """Floating-point operations of one forward and backward pass over so many rows.

    Per token 6 for each matrix parameter (the tied head counts, an untied embedding does not), and for attention
    12·layers·width·length, halved because it is causal (Kaplan et al., arXiv 2001.08361). Full checkpointing computes
    the forward pass again.
    """
    model, length = config.model, config.data.sequence_length
    hidden = model.mlp_width or 4 * model.width
    matrices = model.layers * (4 * model.width**2 + 2 * model.width * hidden)
    head = -(-model.vocab_size // model.pad_vocab_to) * model.pad_vocab_to * model.width
    per_token = 6 * (matrices + head) + 6 * model.layers * model.width * length
    return rows * length * per_token * (4 / 3 if model.checkpointing == "block" else 1)
