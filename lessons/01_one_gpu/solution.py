"""Lesson 1, One GPU: one way to solve the exercises."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def training_bytes(parameters: int) -> dict[str, int]:
    """4 + 4 + 8 bytes per parameter."""
    return {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer states": 2 * 4 * parameters,  # AdamW's two moments
    }


def gigabytes_32b() -> float:
    """16 bytes per parameter: 512 GB."""
    return sum(training_bytes(32 * 10**9).values()) / 1e9


def logits_bytes(rows: int, length: int, vocabulary: int) -> int:
    """Two float32 tensors [rows, length, vocabulary]."""
    return 2 * 4 * rows * length * vocabulary


def held_bytes(tensors: list[Tensor]) -> int:
    """Every storage once, known by its address."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
) -> float:
    """The four lines of every training loop."""
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
