"""Counting the bytes that live tensors really hold, each storage once: on the device, and in host memory."""

from collections.abc import Iterable

import torch
from torch import Tensor


def measure_apart(
    held: dict[str, list[Tensor]], offloaded: dict[str, list[Tensor]], device: torch.device
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by category on the device, and in host memory beside it (empty where there are none).

    offloaded: those of `held` that belong on the host (`Strategy.offloaded`). On a GPU it is not asked: tensors say
    themselves where they lie. On a CPU all lie in one memory, and it alone tells the two apart.
    """
    if device.type != "cpu":
        offloaded = {category: [t for t in tensors if t.device.type == "cpu"] for category, tensors in held.items()}
    on_host = {category: bytes for category, bytes in measure(offloaded).items() if bytes}
    return {category: bytes - on_host.get(category, 0) for category, bytes in measure(held).items()}, on_host


def measure(held: dict[str, list[Tensor]]) -> dict[str, int]:
    """Bytes by category of the storages behind these tensors.

    Many tensors may be views of one storage (gradients in a DDP bucket, parameters in a ZeRO flat buffer, a tied
    head): it counts once, whole, for the first category that names it. Padding is part of a storage and so is counted
    too.
    """
    seen: set[tuple[int, int]] = set()
    return {category: _bytes(tensors, seen) for category, tensors in held.items()}


def _bytes(tensors: Iterable[Tensor], seen: set[tuple[int, int]]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key[0] and key not in seen:
            seen.add(key)
            total += key[1]
    return total
