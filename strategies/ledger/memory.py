"""Counting the bytes that live tensors really hold, each storage once."""

from collections.abc import Iterable

from torch import Tensor


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
