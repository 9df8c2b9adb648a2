"""Lesson 2, Precision. Write the six functions; `shardrun lesson check 2` says what is right."""

import torch
from torch import Tensor, nn


def mixed_precision_gigabytes(parameters: int) -> float:
    """Model states of mixed-precision training as the ZeRO paper counts them, in GB (10⁹ bytes).

    Parameters and gradients in 16 bits; the optimizer (AdamW) in float32, with a master copy of the parameters.
    """
    raise NotImplementedError


def autocast_bytes(parameters: int, linear_weights: int) -> dict[str, int]:
    """Bytes in one process that trains under torch.autocast(dtype=torch.bfloat16) with AdamW.

    parameters: elements of the model, made as usual, in float32; linear_weights: how many of them are weights of linear
    layers. Returns "parameters", "gradients", "optimizer states", and "weight casts": the copies of weights that
    autocast makes in the forward pass and keeps until its context ends.
    """
    raise NotImplementedError


def linear_dtypes(model: nn.Module, inputs: Tensor) -> dict[str, torch.dtype]:
    """Call model(inputs) once; returns the dtype of every nn.Linear's output, by the module's name.

    Names are those of model.named_modules(). The model is left as it was.
    """
    raise NotImplementedError


def master_step(weight: Tensor, master: Tensor, gradient: Tensor, lr: float) -> None:
    """One step of plain gradient descent, w ← w − lr · gradient, in place, without losing small updates.

    weight: bfloat16, what the model computes with; master: float32, the same shape, what is really updated; gradient:
    bfloat16. After it both must be up to date. Called under torch.no_grad().
    """
    raise NotImplementedError


def take_masters(model: nn.Module) -> dict[str, Tensor]:
    """Turn a float32 model into a bfloat16 one, in place, and return the master weights to train it with.

    model: its parameters are initialised, in float32; afterwards each one's `data` is bfloat16, rounded to the nearest.
    Returns a float32 tensor of the same shape for each of model.named_parameters(), by name.
    """
    raise NotImplementedError


def quantize_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (float32, any shape, not empty) in 8 bits: (q, scale) with q of dtype torch.float8_e4m3fn and q · scale ≈ x.

    scale: a float32 tensor with one element; the largest magnitude in x becomes 448, the format's largest number.
    """
    raise NotImplementedError
