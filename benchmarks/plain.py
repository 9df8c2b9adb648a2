"""What one would write by hand around the same model: torch's own AdamW, clipping, and a plain loop for Muon."""

from collections.abc import Callable

import torch

from speedrun.config import OptimizerConfig
from speedrun.model import GPT
from speedrun.optim.orthogonalize import polar_express
from speedrun.optim.policy import kind_of


def plain_update(model: GPT, config: OptimizerConfig, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """A function that clips the gradients, updates the weights and clears the gradients.

    Fused AdamW over everything or, where config.name is muon, over all but the block matrices, which are orthogonalised
    in `dtype` one after another. Rates stay as they are: the time of an update does not depend on them. Of the rest of
    the recipe (NorMuon, cautious decay, updates at every other step) nothing.
    """
    muon, rest = [], []
    for name, p in model.named_parameters():
        is_muon = config.name == "muon" and kind_of(name, tuple(p.shape)) == "block matrix"
        (muon if is_muon else rest).append(p)
    adamw = torch.optim.AdamW(rest, lr=1e-3, betas=config.betas, weight_decay=0.0, fused=True)
    momenta = [torch.zeros_like(p) for p in muon]

    def update() -> None:
        if config.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        adamw.step()
        with torch.no_grad():
            for p, momentum in zip(muon, momenta, strict=True):
                assert p.grad is not None
                momentum.lerp_(p.grad, 0.05)
                orthogonal = polar_express(p.grad.lerp(momentum, 0.95)[None], dtype=dtype)[0]
                p.sub_(orthogonal, alpha=0.01 * max(1.0, p.size(0) / p.size(1)) ** 0.5)
        model.zero_grad()

    return update
