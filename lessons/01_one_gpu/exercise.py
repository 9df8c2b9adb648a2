"""Lesson 1, One GPU. Write the five functions; `shardrun lesson check 1` says what is right."""

import torch
from torch import Tensor, nn


def training_bytes(parameters: int) -> dict[str, int]:
    """Bytes that training holds from one step to the next, in float32 with AdamW, for so many parameters.

    Returns a dictionary with three entries: "parameters", "gradients" and "optimizer states".
    (Leave out AdamW's step counters: 4 bytes per tensor, not per element.)
    """
    raise NotImplementedError


def gigabytes_32b() -> float:
    """What a model of 32 · 10⁹ parameters needs for all three together, in GB (10⁹ bytes)."""
    raise NotImplementedError


def logits_bytes(rows: int, length: int, vocabulary: int) -> int:
    """Bytes of the logits and of their gradient, both in float32, when the backward pass begins.

    A batch has `rows` rows of `length` tokens; the model chooses among `vocabulary` tokens at every position.
    """
    raise NotImplementedError


def held_bytes(tensors: list[Tensor]) -> int:
    """Bytes of memory behind these tensors, each storage once.

    Several tensors can share one storage: a tied head is the embedding, a view is a part of another tensor. A storage
    counts whole, even if only a view of a part of it is in the list.
    """
    raise NotImplementedError


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> float:
    """One step: forward pass, mean cross-entropy, backward pass, update. Returns the loss as a Python number.

    inputs, targets: int64 [rows, length]; model(inputs) gives logits, float32 [rows, length, vocabulary].
    Gradients of the step before may still be there when this is called.
    """
    raise NotImplementedError
