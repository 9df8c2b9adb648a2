"""Lesson 2, Precision: one way to solve the exercises."""

import torch
from torch import Tensor, nn


def mixed_precision_gigabytes(parameters: int) -> float:
    """2 + 2 + (4 + 4 + 4) = 16 bytes per parameter."""
    half, full = 2 * parameters, 4 * parameters
    return (half + half + 3 * full) / 1e9


def autocast_bytes(parameters: int, linear_weights: int) -> dict[str, int]:
    """Everything as in float32, and 2 bytes more per linear weight while the context is open."""
    return {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer states": 8 * parameters,
        "weight casts": 2 * linear_weights,
    }


def linear_dtypes(model: nn.Module, inputs: Tensor) -> dict[str, torch.dtype]:
    """A hook on every linear layer, removed afterwards."""
    found: dict[str, torch.dtype] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def note(module: nn.Module, inputs: tuple, output: Tensor, name: str = name) -> None:
                found[name] = output.dtype

            handles.append(module.register_forward_hook(note))
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def master_step(weight: Tensor, master: Tensor, gradient: Tensor, lr: float) -> None:
    """The master adds up what bfloat16 would round away; the weight is its rounded copy."""
    master.sub_(lr * gradient.float())
    weight.copy_(master)


def take_masters(model: nn.Module) -> dict[str, Tensor]:
    """The masters first: what has been rounded does not come back."""
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.bfloat16()
    return masters


def quantize_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale by the largest magnitude there is ("current scaling")."""
    scale = (x.abs().max() / 448).clamp(min=1e-30)
    return (x / scale).to(torch.float8_e4m3fn), scale
