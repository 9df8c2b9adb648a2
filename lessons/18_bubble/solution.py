"""Lesson 18, the bubble: one way to solve the exercises."""


def compute_seconds(parameters: int, tokens: int, ranks: int, rate: float, mfu: float) -> float:
    """2 operations per parameter and token in forward, 4 in backward."""
    return 6 * parameters * tokens / (ranks * rate * mfu)


def link_seconds(payload: int, collective: str, ranks: int, gigabits: float) -> float:
    """Ring bytes over bytes per second."""
    passes = 2 if collective == "all_reduce" else 1
    return passes * (ranks - 1) / ranks * payload / (gigabits * 1e9 / 8)


def least_tokens(ranks: int, gradient_bytes: int, bandwidth: float, rate: float) -> float:
    """4 Ψ tokens / rate = 2 (N − 1)/N bytes Ψ / bandwidth."""
    return 2 * (ranks - 1) / ranks * gradient_bytes * rate / (4 * bandwidth)


def record_seconds(traffic: list[dict], bandwidth: float, latency: float) -> float:
    """α per call, 1/β per byte on the ring."""
    return sum(line["calls"] * latency + line["ring_bytes"] / bandwidth for line in traffic)


def exposed(backward: list[float], messages: list[float]) -> float:
    """Two clocks."""
    ready = free = 0.0
    for seconds, message in zip(backward, messages, strict=True):
        ready += seconds
        free = max(ready, free) + message
    return free - ready
