"""Lesson 9, All strategies side by side: one way to solve the exercises."""

import math


def _per_parameter(ranks: int) -> dict[str, float]:
    """Bytes per parameter: what is whole, and what is shared out."""
    return {
        "ddp": 4 + 4 + 8,
        "fsdp": (4 + 4 + 8) / ranks,
        "zero1": 2 + (4 + 2 + 8) / ranks,
        "zero2": 2 + (4 + 2 + 8) / ranks,
        "zero3": (2 + 4 + 2 + 8) / ranks,
    }


def states_gb(parameters: int, ranks: int) -> dict[str, float]:
    """Bytes per parameter times parameters."""
    return {name: each * parameters / 1e9 for name, each in _per_parameter(ranks).items()}


def largest_model(room: float, ranks: int) -> dict[str, float]:
    """The same turned around."""
    each = _per_parameter(ranks)
    return {name: room / each[name] for name in ("ddp", "zero2", "fsdp")}


def wire_bytes(parameters: int, ranks: int, accumulation: int) -> dict[str, float]:
    """Bytes per parameter and pass of the ring; an all-reduce is two passes."""
    a = accumulation
    passed = {
        "ddp": 2 * 4,
        "fsdp": 2 * 2 * a + 4,
        "zero1": 2 * 2 + 2,
        "zero2": 2 * 2 * a + 2,
        "zero3": (2 * 2 + 2) * a,
    }
    return {name: each * parameters * (ranks - 1) / ranks for name, each in passed.items()}


def choose(memory: dict[str, float], sent: dict[str, float], room: float) -> str | None:
    """Memory decides what is possible, traffic what is best."""
    fitting = [name for name in memory if memory[name] <= room]
    return min(fitting, key=lambda name: (sent[name], memory[name])) if fitting else None


def worst_difference(losses: dict[str, list[float]]) -> tuple[str, int, float]:
    """Nan is asked for by name: it loses every comparison."""
    first, *others = losses
    found = []
    for name in others:
        pairs = zip(losses[name], losses[first], strict=True)
        for step, (loss, reference) in enumerate(pairs, start=1):
            apart = math.inf if math.isnan(loss) else abs(loss - reference) / reference
            found.append((name, step, apart))
    return max(found, key=lambda entry: entry[2])
